#include "settings_options.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>

#include "errors.hpp"

namespace varve::tool {

namespace {

using json = nlohmann::json;

std::uint64_t whole_number(std::string const& text, std::uint64_t least, std::uint64_t most) {
    std::uint64_t value = 0;
    auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (code == std::errc::result_out_of_range || (code == std::errc() && end == text.data() + text.size() && (value < least || value > most)))
        throw usage_error("must be from " + std::to_string(least) + " to " + std::to_string(most));
    if (code != std::errc() || end != text.data() + text.size())
        throw usage_error("must be a whole number" + std::string(least > 0 ? ", at least " + std::to_string(least) : ", 0 or more"));
    return value;
}

double real_number(std::string const& text, double least, double below) {
    double value = 0;
    auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (code != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) throw usage_error("must be a number");
    if (value < least || value >= below) {
        auto shown = [](double d) { return json(d).dump(); };
        throw usage_error("must be at least " + shown(least) + " and less than " + shown(below));
    }
    return value;
}

template <class Field>
option_spec whole(std::string name, std::string section, Field field, std::uint64_t least, std::uint64_t most, std::string help) {
    option_spec o{std::move(name), std::move(section), "N", std::move(help)};
    o.set = [=](settings& s, std::string const& text) { field(s) = whole_number(text, least, most); };
    o.get = [=](settings const& s) -> json { return field(s); };
    return o;
}

template <class Field>
option_spec real(std::string name, Field field, double least, double below, std::string help) {
    option_spec o{std::move(name), "run", "X", std::move(help)};
    o.set = [=](settings& s, std::string const& text) { field(s) = real_number(text, least, below); };
    o.get = [=](settings const& s) -> json { return field(s); };
    return o;
}

template <class Field>
option_spec choice(std::string name, Field field, std::vector<std::string> choices, std::string help) {
    std::string listed;
    for (auto const& c : choices) listed += (listed.empty() ? "" : c == choices.back() ? " or " : ", ") + c;
    option_spec o{std::move(name), "run", "WORD", help + listed};
    o.set = [=](settings& s, std::string const& text) {
        if (std::find(choices.begin(), choices.end(), text) == choices.end()) throw usage_error("must be " + listed);
        field(s) = text;
    };
    o.get = [=](settings const& s) -> json { return field(s); };
    return o;
}

template <class Field>
option_spec text(std::string name, std::string section, std::string placeholder, Field field, std::string help) {
    option_spec o{std::move(name), std::move(section), std::move(placeholder), std::move(help)};
    o.set = [=](settings& s, std::string const& value) {
        if (value.empty()) throw usage_error("must not be empty");
        field(s) = value;
    };
    o.get = [=](settings const& s) -> json { return field(s); };
    return o;
}

template <class Field>
option_spec toggle(std::string name, std::string section, Field field, std::string help) {
    option_spec o{std::move(name), std::move(section), "", std::move(help)};
    o.set = [=](settings& s, std::string value) {
        for (auto& c : value) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
        if (value != "true" && value != "false" && value != "on" && value != "off" && value != "yes" && value != "no")
            throw usage_error("must be true or false");
        field(s) = value == "true" || value == "on" || value == "yes";
    };
    o.get = [=](settings const& s) -> json { return field(s); };
    return o;
}

option_spec bench_only(option_spec o) {
    o.train = false;
    return o;
}

option_spec train_only(option_spec o) {
    o.bench = false;
    return o;
}

option_spec methods_option() {
    option_spec o{"methods", "run", "A B ...", "methods to compare, by name or combination; --list shows them all"};
    o.many = true;
    o.train = false;
    o.set = [](settings& s, std::string const& value) {
        s.run.methods.clear();
        for (std::size_t at = 0; at < value.size();) {
            auto end = std::min(value.find_first_of(" ,", at), value.size());
            auto name = value.substr(at, end - at);
            if (!name.empty() && std::find(s.run.methods.begin(), s.run.methods.end(), name) == s.run.methods.end()) s.run.methods.push_back(name);
            at = end + 1;
        }
        if (s.run.methods.empty()) throw usage_error("names no method");
    };
    o.get = [](settings const& s) -> json { return s.run.methods; };
    return o;
}

option_spec from_step_option() {
    option_spec o{"from-step", "", "S", "go on from the checkpoint of step S instead of the newest"};
    o.bench = false;
    o.set = [](settings& s, std::string const& value) { s.command.from_step = whole_number(value, 1, 999'999'999'999); };
    o.get = [](settings const& s) -> json { return s.command.from_step ? json(*s.command.from_step) : json(); };
    return o;
}

// A field of settings, const or not.
constexpr auto in_model = [](auto member) { return [member](auto& s) -> auto& { return s.model.*member; }; };
constexpr auto in_training = [](auto member) { return [member](auto& s) -> auto& { return s.training.*member; }; };
constexpr auto in_pccheck = [](auto member) { return [member](auto& s) -> auto& { return s.pccheck.*member; }; };
constexpr auto in_run = [](auto member) { return [member](auto& s) -> auto& { return s.run.*member; }; };
constexpr auto in_command = [](auto member) { return [member](auto& s) -> auto& { return s.command.*member; }; };

std::vector<option_spec> make_specs() {
    using m = model_settings;
    using t = training_settings;
    using p = pccheck_settings;
    using r = run_settings;
    using c = command_settings;
    // Steps are 12 digits in a file's name; the other limits keep sizes within 64 bits. Usual ranges are advice.
    constexpr std::uint64_t million = 1'000'000, trillion = 1'000'000'000'000;
    return {
        train_only(text("method", "", "M", in_command(&c::method), "the method, by name or combination (needs files); required")),
        train_only(text("dir", "", "D", in_command(&c::dir), "the store; training goes on from its newest whole checkpoint; required")),
        from_step_option(),
        train_only(toggle("fresh", "", in_command(&c::fresh), "start over from step 1")),
        train_only(toggle("overwrite", "", in_command(&c::overwrite), "with --fresh: even where the store has checkpoints")),

        whole("d-model", "model", in_model(&m::d_model), 1, million, "width of the model (usual 256-1024)"),
        whole("num-layers", "model", in_model(&m::num_layers), 1, 10'000, "encoder layers (usual 2-12)"),
        whole("nhead", "model", in_model(&m::nhead), 1, million, "attention heads; must divide --d-model (usual 4-16)"),
        whole("vocab-size", "model", in_model(&m::vocab_size), 1, 100 * million, "tokens in the vocabulary (usual 5000-50000)"),
        whole("dim-feedforward", "model", in_model(&m::dim_feedforward), 1, 10 * million, "width of the feed-forward part (usual 1024-4096)"),

        whole("num-samples", "training", in_training(&t::num_samples), 1, 1000 * million, "samples in the data set (usual 500-5000)"),
        whole("seq-len", "training", in_training(&t::seq_len), 1, 512, "tokens in a sample (usual 64-512, at most 512)"),
        whole("batch-size", "training", in_training(&t::batch_size), 1, million, "samples in a step (usual 8-32)"),
        whole("num-steps", "training", in_training(&t::num_steps), 1, trillion - 1, "steps to train (usual 50-500)"),
        whole("checkpoint-freq", "training", in_training(&t::checkpoint_freq), 1, trillion - 1, "steps from one checkpoint to the next (usual 5-50)"),

        whole("num-threads", "pccheck", in_pccheck(&p::num_threads), 1, 1024,
              "posix: writes at once; io_uring, asio: queue depth; digest workers, at most the cores (usual 4-16)"),
        whole("max-async", "pccheck", in_pccheck(&p::max_async), 1, 1024, "saves in flight at most (usual 2-8)"),
        whole("buffer-size-mb", "pccheck", in_pccheck(&p::buffer_size_mb), 1, million,
              "MB (10^6 bytes) after which, at the latest, a layerwise save hands blocks to the sink (usual 20-200)"),
        whole("batch-size-mb", "pccheck", in_pccheck(&p::batch_size_mb), 1, million,
              "MB of one save that may be between tensors and disk at once (usual 50-500)"),
        toggle("use-monitor", "pccheck", in_pccheck(&p::use_monitor), "a process of its own, started here, owns the store and outlives this one"),

        methods_option(),
        choice("when-busy", in_run(&r::when_busy), {"block", "skip", "replace"}, "what a save does when --max-async are in flight: "),
        choice("prepare", in_run(&r::prepare), {"write", "allocate", "none"}, "what becomes of the files when the store opens: "),
        whole("pool-size-mb", "run", in_run(&r::pool_size_mb), 0, million,
              "MB of staging memory, never above a quarter of the usable memory; 0: one checkpoint, 268 MB (256 MiB) on a GPU"),
        whole("keep", "run", in_run(&r::keep), 1, million, "checkpoints to keep, the last ones"),
        whole("keep-every", "run", in_run(&r::keep_every), 0, trillion - 1, "keep every checkpoint whose step is a multiple of N for ever; 0: off"),
        choice("update", in_run(&r::update), {"plain", "foreach", "fused"},
               "the optimizer's kernels, by default plain on a CPU and fused on a GPU: "),
        choice("gpu-snapshot", in_run(&r::gpu_snapshot), {"auto", "on", "off"}, "copy inside the GPU first, for trainings there: "),
        choice("device", in_run(&r::device), {"auto", "cpu", "cuda"}, "where to train; auto: cuda if the build and the machine have it: "),
        real("dropout", in_run(&r::dropout), 0, 1, "share of activations dropped"),
        real("lr", in_run(&r::lr), 0, 1e6, "learning rate of Adam"),
        whole("seed", "run", in_run(&r::seed), 0, std::numeric_limits<std::int64_t>::max(), "of the weights, the data and dropout"),
        bench_only(whole("warmup", "run", in_run(&r::warmup), 0, million, "steps before step 1, not counted")),
        bench_only(whole("repeat", "run", in_run(&r::repeat), 1, 1000, "runs of each method, taking turns; medians are reported")),

        bench_only(text("scenario", "run", "WORD", in_run(&r::scenario),
                        "small, medium, large, frequency, monitor or all: sets sizes, under file and flags")),
        bench_only(text("output-dir", "run", "DIR", in_run(&r::output_dir), "where results go; made if absent")),
        bench_only(text("checkpoint-dir", "run", "DIR", in_run(&r::checkpoint_dir), "a store per method below it (default OUTPUT_DIR/checkpoints)")),
        bench_only(toggle("keep-checkpoints", "run", in_run(&r::keep_checkpoints), "leave the checkpoints there after the check")),
        text("monitor", "run", "ADDRESS", in_run(&r::monitor), "use the monitor that runs there, unix:PATH or tcp:HOST:PORT (see varve monitor)"),
        train_only(text("peer", "run", "HOST:PORT", in_run(&r::peer),
                        "with --use-monitor: another host's monitor, which gets a copy and is asked for what is not here")),
        text("cert", "run", "FILE", in_run(&r::cert), "our certificate for a monitor on another host (PEM)"),
        text("key", "run", "FILE", in_run(&r::key), "its key"),
        text("ca", "run", "FILE", in_run(&r::ca), "the authority that the monitor's certificate must be of"),
        train_only(whole("linger", "run", in_run(&r::linger), 0, million,
                         "seconds that a monitor started here keeps the newest checkpoint in memory when this process dies")),
        real("durable-interval", in_run(&r::durable_interval), 0, 1e6,
             "with a monitor and --when-busy replace: seconds from one write to the disk to the next, 0: off; every save is crash-safe"),
        text("events", "run", "FILE", in_run(&r::events), "append one JSON object a line for every milestone"),
        bench_only(toggle("dry-run", "", in_command(&c::dry_run), "print sizes and the plan; do nothing")),
        bench_only(toggle("list", "", in_command(&c::list), "list methods and combinations, and what cannot run here")),
    };
}

}  // namespace

std::vector<option_spec> const& option_specs() {
    static std::vector<option_spec> const specs = make_specs();
    return specs;
}

option_spec const* find_option(std::string_view name, settings_command command) {
    for (auto const& o : option_specs())
        if (o.name == name && o.belongs_to(command)) return &o;
    return nullptr;
}

std::string nearest_option(std::string_view name, settings_command command) {
    std::string best;
    std::size_t best_distance = name.size() / 3 + 1;
    for (auto const& o : option_specs()) {
        if (!o.belongs_to(command)) continue;
        // Levenshtein distance, one row at a time.
        std::vector<std::size_t> row(o.name.size() + 1);
        std::iota(row.begin(), row.end(), 0u);
        for (std::size_t i = 0; i < name.size(); ++i) {
            auto diagonal = row[0]++;
            for (std::size_t j = 0; j < o.name.size(); ++j) {
                auto above = row[j + 1];
                row[j + 1] = std::min({above + 1, row[j] + 1, diagonal + (name[i] == o.name[j] ? 0 : 1)});
                diagonal = above;
            }
        }
        if (row.back() < best_distance) {
            best_distance = row.back();
            best = o.name;
        }
    }
    return best;
}

}  // namespace varve::tool
