#include "commands.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <ostream>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "varve/version.hpp"

#include "bench_plan.hpp"
#include "bench_result.hpp"
#include "bench_store.hpp"
#include "errors.hpp"
#include "machine.hpp"
#include "methods.hpp"
#include "probe.hpp"
#include "process.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "settings.hpp"
#include "signals.hpp"
#include "trainer.hpp"

namespace varve::tool {

namespace {

using json = nlohmann::json;

/// A method's process ended without a result.
struct method_failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// One comparison from its first process to its result file.
class bench_comparison {
public:
    bench_comparison(planned_comparison const& plan, std::string command, std::ostream& out, std::ostream& err)
        : plan_(plan), settings_(plan.chosen), command_(std::move(command)), out_(out), err_(err) {
        methods_.push_back({"none", "No Checkpoint", {}});
        for (auto const& name : settings_.run.methods)
            if (name != "none") methods_.push_back({name, runnable_method(name).result_key, {}});
    }

    /// Returns whether everything that was compared counts.
    bool run() {
        auto const started = utc_now();
        std::filesystem::path const output = settings_.run.output_dir, checkpoints = settings_.checkpoint_dir();
        make_writable_folder(output, "output folder");
        bool const made = !std::filesystem::exists(checkpoints);
        make_writable_folder(checkpoints, "checkpoint folder");
        for (auto const& m : methods_)
            if (has_files(m)) prepare_bench_store(store_of(m));
        if (!plan_.title.empty()) err_ << plan_.title << '\n' << std::flush;

        // What was measured is not lost to the method that fails behind it, nor whole rounds to a stop.
        std::exception_ptr failure;
        bool stopped = false;
        auto rounds = settings_.run.repeat;
        for (std::uint64_t repeat = 0; repeat < settings_.run.repeat && !failure; ++repeat) {
            for (auto& m : methods_) {
                try {
                    if (stop_signals::requested()) throw interrupted("stopped before " + m.name);
                    settle_disk(checkpoints);
                    run_method(m, repeat);
                } catch (method_failed const&) {
                    failure = std::current_exception();
                    break;
                } catch (usage_error const&) {
                    failure = std::current_exception();  // what only the method itself finds out
                    break;
                } catch (interrupted const& e) {
                    if (repeat == 0) throw interrupted(e.what() + std::string("; no result was written"));
                    failure = std::make_exception_ptr(interrupted(
                        e.what() + ("; the result is of the " + std::to_string(repeat) + (repeat == 1 ? " round" : " rounds") + " before")));
                    stopped = true;
                    rounds = repeat;
                    break;
                }
                // Between the runs, so that it sees the disk in the state in which they see it.
                if (m.name == "none") measure_disk(checkpoints);
            }
        }
        for (auto& m : methods_) m.runs.resize(std::min<std::size_t>(m.runs.size(), rounds));
        best_write_.resize(std::min<std::size_t>(best_write_.size(), rounds));
        limits_.resize(best_write_.size());
        std::erase_if(methods_, [](auto const& m) { return m.runs.empty(); });
        if (failure && !stopped && methods_.size() < 2) std::rethrow_exception(failure);
        auto const compared = compare_runs(methods_, best_write_);
        json document;
        document["results"] = compared.results;
        document["machine"] = describe_machine(checkpoints);
        for (auto const& [key, value] : methods_.front().runs.front().at("_torch").items()) document["machine"][key] = value;
        document["config"] = to_json(settings_);
        document["config"]["run"]["repeat"] = rounds;
        document["config"]["run"]["checkpoint_dir"] = checkpoints.string();
        document["config"]["run"]["device"] = chosen_device(settings_);  // what auto came to
        document["config"]["run"]["update"] = chosen_update(settings_);
        document["config"]["effective"] = compared.effective;
        document["config"]["command"] = command_;
        auto const fastest = std::max_element(best_write_.begin(), best_write_.end());
        if (fastest != best_write_.end() && *fastest > 0) document["limits"] = limits_[static_cast<std::size_t>(fastest - best_write_.begin())];
        document["started"] = started;
        document["version"] = VARVE_VERSION;
        if (made && !settings_.run.keep_checkpoints) {
            std::error_code ignored;  // somebody may have put something there
            std::filesystem::remove(checkpoints, ignored);
        }
        std::vector<std::string> order;
        for (auto const& m : methods_) order.push_back(m.result_key);
        if (!plan_.title.empty()) out_ << plan_.title << '\n';
        out_ << comparison_table(compared.results, order) << std::flush;
        out_ << "result: " << write_result(output, plan_.suffix, document).string() << std::endl;
        for (auto const& fault : compared.faults) err_ << "varve bench: " << fault << '\n';
        if (failure) std::rethrow_exception(failure);
        return compared.faults.empty();
    }

private:
    static bool has_files(method_runs const& m) { return m.name != "none" && runnable_method(m.name).writes_files; }
    std::filesystem::path store_of(method_runs const& m) const { return settings_.checkpoint_dir() / m.name; }

    void run_method(method_runs& m, std::uint64_t repeat) {
        auto label = m.name;
        if (settings_.run.repeat > 1) label += " (" + std::to_string(repeat + 1) + " of " + std::to_string(settings_.run.repeat) + ")";
        try {
            if (has_files(m)) prepare_bench_store(store_of(m));
        } catch (error const& e) {
            throw method_failed(label + ": " + e.what());
        }
        json job{{"settings", to_json(settings_)}, {"method", m.name}, {"store", store_of(m).string()}, {"label", label}};
        auto const child = run_self({"bench-run"}, job.dump());
        if (stop_signals::requested() || child.exit_code == 130)
            throw interrupted("stopped during " + label + (has_files(m) ? ", whose checkpoints are in " + store_of(m).string() : ""));
        auto run = json::parse(child.output, nullptr, false);
        if (child.exit_code != 0 || run.is_discarded()) {
            if (child.signal == 9) throw method_failed(label + " was killed: out of memory, as a rule; take a smaller model or --pool-size-mb");
            if (child.signal != 0) throw method_failed(label + " ended with signal " + std::to_string(child.signal));
            if (run.is_object() && run.contains("_error")) {
                auto const why = label + ": " + run["_error"].get<std::string>();
                if (child.exit_code == 2) throw usage_error(why);
                throw method_failed(why);
            }
            throw method_failed(label + " failed with exit code " + std::to_string(child.exit_code));
        }
        summarise(label, run);
        m.runs.push_back(std::move(run));
        try {
            if (has_files(m) && !settings_.run.keep_checkpoints) remove_bench_store(store_of(m));
        } catch (error const& e) {
            err_ << label << ": its checkpoints stay: " << e.what() << '\n';
        }
    }

    void summarise(std::string const& label, json const& run) {
        auto number = [&](char const* path) { return short_number(run.at(json::json_pointer(path)).get<double>()); };
        err_ << label << ": " << number("/drained_time_sec") << " s until drained, loop " << number("/loop_time_sec") << " s, step "
             << number("/training_step/mean_ms") << " ms, peak " << number("/memory/peak_cpu_gb") << " GB";
        if (run.contains("checkpoint"))
            err_ << ", " << run["checkpoint"]["count"].get<std::uint64_t>() << " checkpoints, " << number("/checkpoint/mean_ms") << " ms each";
        if (run.contains("restore"))
            err_ << ", restored in " << number("/restore/time_ms") << " ms, " << (run["restore"]["bit_exact"].get<bool>() ? "" : "NOT ")
                 << "bit-exact";
        err_ << '\n' << std::flush;
    }

    void measure_disk(std::filesystem::path const& dir) {
        best_write_.push_back(0);
        limits_.emplace_back();
        if (methods_.size() == 1) return;
        // As large as a checkpoint where that is affordable: small files see the drive's cache, large ones cost time.
        constexpr std::uint64_t unit = 4u << 20;
        auto const size = std::clamp<std::uint64_t>(estimated_checkpoint_bytes(settings_) / unit * unit, 4 * unit, 128 * unit);
        try {
            auto const limits = measure_limits(dir, size);
            double best = limits.value("/direct/write_gb_per_s"_json_pointer, 0.0);
            if (limits.contains("sinks"))
                for (auto const& [name, sink] : limits["sinks"].items()) best = std::max(best, sink.value("write_gb_per_s", 0.0));
            best_write_.back() = best;
            limits_.back() = limits;
        } catch (std::exception const& e) {
            err_ << "the disk was not measured: " << e.what() << '\n';
        }
    }

    planned_comparison const& plan_;
    settings const& settings_;
    std::string command_;
    std::ostream& out_;
    std::ostream& err_;
    std::vector<method_runs> methods_;
    std::vector<double> best_write_;  ///< by any sink, a round each; 0 where it was not measured
    std::vector<json> limits_;
};

std::string command_line(std::vector<std::string> const& args) {
    std::string text = "varve bench";
    for (auto const& a : args) {
        bool const plain = !a.empty() && a.find_first_of(" '\"\\$`*?[](){}<>|&;#~\n\t") == std::string::npos;
        text += plain ? " " + a : " '" + a + "'";
    }
    return text;
}

}  // namespace

int bench(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    auto const given = read_settings(settings_command::bench, args);
    std::string scenario;
    for (auto const* values : {&given.file, &given.flags})
        for (auto const& [name, value] : *values)
            if (name == "scenario") scenario = value;
    // What only prints needs no scenario; a wrong value still is one.
    auto const first = resolve(given, scenario == "all" ? "medium" : scenario);
    if (first.command.help) {
        out << "Usage: varve bench [options]\n"
               "Trains the guide's transformer with each method and compares them. Settings: default < scenario < file < flag.\n"
            << settings_help(settings_command::bench);
        return 0;
    }
    if (first.command.list) {
        out << list_methods();
        return 0;
    }
    require_trainer();
    std::vector<std::string> notes;
    auto const plan = plan_bench(given, scenario, notes);
    for (auto const& note : notes) err << note << '\n';
    if (first.command.dry_run) {
        out << describe_plan(plan);
        return 0;
    }
    stop_signals signals(false);
    bool good = true;
    for (auto const& p : plan) good = bench_comparison(p, command_line(args), out, err).run() && good;
    if (scenario == "all") {
        std::filesystem::path const dir = first.run.output_dir;
        write_report({dir, dir / "report.md"}, out, err);
    }
    return good ? 0 : 1;
}

}  // namespace varve::tool
