#include "bench_plan.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>

#include "errors.hpp"
#include "machine.hpp"
#include "methods.hpp"
#include "progress.hpp"
#include "trainer.hpp"

namespace varve::tool {

namespace {

std::string gb(double bytes) { return short_number(bytes / 1e9) + " GB"; }

void check_methods(settings const& s) {
    for (auto const& name : s.run.methods) {
        if (name == "none") continue;
        runnable_method(name);
        if (name.starts_with("host+") && chosen_device(s) == "cuda")
            throw usage_error(name + ": host staging cannot read GPU memory; take pinned" + name.substr(4) + ", or --device cpu");
    }
}

bool runnable(std::string_view name) {
    auto const& all = methods();
    return std::any_of(all.begin(), all.end(), [&](auto const& m) { return m.name == name && m.missing.empty(); });
}

/// What is not built is said, not run; what was asked for by its name stays, to be refused.
void leave_out_missing(settings& s, std::vector<std::string>& notes) {
    std::erase_if(s.run.methods, [&](auto const& name) {
        if (name == "none" || runnable(name)) return false;
        if (auto note = "method " + name + " is left out: see varve bench --list"; std::count(notes.begin(), notes.end(), note) == 0)
            notes.push_back(std::move(note));
        return true;
    });
}

/// N in flight and K kept are N + K files, and one more while a kept one is replaced.
std::uint64_t files_of_a_store(settings const& s) { return s.pccheck.max_async + s.run.keep; }

std::vector<planned_comparison> frequencies(given_settings const& given, std::vector<std::string>& notes, bool alone) {
    if (alone && given.has("checkpoint-freq"))
        throw usage_error("--scenario frequency goes through --checkpoint-freq 5, 10, 20 and 50 itself; leave the option out");
    std::vector<planned_comparison> plan;
    for (std::uint64_t freq : {5, 10, 20, 50}) {
        auto s = resolve(given, "frequency");
        if (freq > s.training.num_steps) {
            notes.push_back("every " + std::to_string(freq) + " steps is left out: no checkpoint would be due in " +
                            std::to_string(s.training.num_steps));
            continue;
        }
        s.training.checkpoint_freq = freq;
        plan.push_back({s, "frequency: every " + std::to_string(freq) + " steps", "_freq" + std::to_string(freq)});
    }
    return plan;
}

/// For the methods without a monitor, and for those with one.
std::string describe_pool(settings const& s) {
    bool without = false, with = false, in_gpu = false;
    for (auto const& name : s.run.methods) {
        if (name == "none") continue;
        auto const& m = runnable_method(name);
        bool const monitored = m.has_monitor(s.wants_monitor());
        (!monitored ? without : name.starts_with("gds+") ? in_gpu : with) = true;
    }
    std::uint64_t const no_limit = std::numeric_limits<std::uint64_t>::max();
    auto of = [&](pool_place place, std::uint64_t most = usable_memory_bytes() / 4) {
        auto const pool =
            s.run.pool_size_mb ? s.run.pool_size_mb * 1'000'000 : default_pool_bytes(estimated_checkpoint_bytes(s), place, busy_mode(s));
        auto const taken = std::min(pool, most);
        auto const images = std::max<std::uint64_t>(1, taken / std::max<std::uint64_t>(1, estimated_checkpoint_bytes(s)));
        return gb(double(taken)) + (most < pool ? " (a quarter of the usable memory)" : "") +
               (place == pool_place::host && images < s.pccheck.max_async
                    ? ", room for " + std::to_string(images) + (images == 1 ? " save" : " saves") + " in flight"
                    : "");
    };
    std::string out;
    if (without) out = of(chosen_device(s) == "cuda" ? pool_place::gpu : pool_place::host);
    if (with) out += (out.empty() ? "" : "; ") + of(pool_place::monitor) + " with a monitor";
    if (in_gpu) out += (out.empty() ? "" : "; ") + of(pool_place::monitor, no_limit) + " in GPU memory with a monitor";
    return out.empty() ? "none" : out;
}

}  // namespace

void check_memory(settings const& s) {
    auto const needed = estimated_training_bytes(s), usable = usable_memory_bytes();
    if (needed > usable)
        throw usage_error("training this model takes about " + gb(double(needed)) + " of memory and " + gb(double(usable)) +
                          " can be used; take a smaller --d-model, --num-layers, --vocab-size or --batch-size");
}

std::vector<planned_comparison> plan_bench(given_settings const& given, std::string const& scenario, std::vector<std::string>& notes) {
    std::vector<planned_comparison> plan;
    if (scenario == "all") {
        for (std::string const one : {"small", "medium", "large"}) plan.push_back({resolve(given, one), one, "_" + one});
        for (auto& p : frequencies(given, notes, false)) plan.push_back(std::move(p));
        if (runnable("layerwise-monitor"))
            plan.push_back({resolve(given, "monitor"), "monitor", "_monitor"});
        else
            notes.push_back("scenario monitor is left out: the monitor is not built");
        if (!given.has("methods"))
            for (auto& p : plan) leave_out_missing(p.chosen, notes);
    } else if (scenario == "frequency") {
        plan = frequencies(given, notes, true);
    } else {
        plan.push_back({resolve(given, scenario), scenario, ""});
    }
    for (auto const& p : plan) {
        check_settings(p.chosen, settings_command::bench);
        check_methods(p.chosen);
        if (chosen_device(p.chosen) == "cpu") check_memory(p.chosen);
    }
    if (plan.empty()) throw usage_error("nothing to run: --num-steps is below every frequency");
    return plan;
}

std::string describe_plan(std::vector<planned_comparison> const& plan) {
    std::ostringstream out;
    for (auto const& p : plan) {
        auto const& s = p.chosen;
        auto const bytes = double(estimated_checkpoint_bytes(s));
        auto const files = files_of_a_store(s);
        if (!p.title.empty()) out << p.title << ":\n";
        out << "  one checkpoint   about " << gb(bytes) << '\n'
            << "  files            " << files << " at most (" << s.pccheck.max_async << " in flight, " << s.run.keep << " kept"
            << (s.run.keep_every ? ", more kept for ever" : "") << ")\n"
            << "  disk             up to " << gb(bytes * double(files)) << " for one method at a time"
            << (s.run.keep_checkpoints ? " (each stays)" : "") << ", " << gb(double(free_disk_bytes(s.checkpoint_dir()))) << " free\n"
            << "  staging pool     " << describe_pool(s) << '\n'
            << "  plan             " << s.run.repeat << (s.run.repeat == 1 ? " run" : " runs") << " of none";
        for (auto const& m : s.run.methods)
            if (m != "none") out << ", " << m;
        out << ": " << s.run.warmup << " warm-up steps, " << s.training.num_steps << " steps, " << s.training.num_steps / s.training.checkpoint_freq
            << " checkpoints each\n"
            << "  results          " << s.run.output_dir << ", checkpoints " << s.checkpoint_dir().string() << '\n';
    }
    return out.str();
}

std::string list_methods() {
    std::ostringstream out;
    auto line = [&](std::string name, std::string const& description, std::string const& missing) {
        name.resize(std::max<std::size_t>(name.size() + 2, 28), ' ');
        out << name << description << (missing.empty() ? "" : (description.empty() ? "" : "; ") + ("cannot run here: " + missing)) << '\n';
    };
    for (auto const& m : methods()) line(m.name, m.description, m.missing);
    line("none", "no checkpoints; always run once beside the others", "");
    return out.str();
}

}  // namespace varve::tool
