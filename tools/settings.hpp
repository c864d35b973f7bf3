#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "varve/checkpointer_options.hpp"
#include "varve/store.hpp"

namespace varve::tool {

/// The settings of `bench` and `train`, in the sections of the configuration file; names as there.
struct model_settings {
    std::uint64_t d_model = 512;
    std::uint64_t num_layers = 6;
    std::uint64_t nhead = 8;
    std::uint64_t vocab_size = 10'000;
    std::uint64_t dim_feedforward = 2048;
};

struct training_settings {
    std::uint64_t num_samples = 1000;
    std::uint64_t seq_len = 128;
    std::uint64_t batch_size = 16;
    std::uint64_t num_steps = 100;
    std::uint64_t checkpoint_freq = 10;
};

struct pccheck_settings {
    std::uint64_t num_threads = 8;
    std::uint64_t max_async = 4;
    std::uint64_t buffer_size_mb = 50;
    std::uint64_t batch_size_mb = 100;
    bool use_monitor = false;
};

struct run_settings {
    std::vector<std::string> methods{"traditional", "original", "layerwise"};
    std::string scenario;
    std::string when_busy = "block";
    std::string update;  ///< empty: plain on a CPU, fused on a GPU
    std::string gpu_snapshot = "auto";
    std::uint64_t pool_size_mb = 0;  ///< 0: default_pool_bytes
    std::uint64_t keep = 2;
    std::uint64_t keep_every = 0;  ///< 0: off
    std::string prepare = "write";
    double dropout = 0.1;
    double lr = 0.001;
    std::uint64_t seed = 0;
    std::uint64_t warmup = 10;
    std::uint64_t repeat = 1;
    std::string device = "auto";
    std::string output_dir = "./results";
    std::string checkpoint_dir;  ///< empty: OUTPUT_DIR/checkpoints
    bool keep_checkpoints = false;
    std::string events;
    std::string monitor;          ///< where a running one is; empty: --use-monitor starts one
    std::string cert, key, ca;    ///< for one over TCP, or for its peer
    std::string peer;             ///< of a monitor that is started here
    std::uint64_t linger = 60;    ///< of one that is started here, in seconds
    double durable_interval = 0;  ///< with one, in seconds
};

/// What only `train` has, and what is given on the command line alone.
struct command_settings {
    std::string method;
    std::string dir;
    std::optional<std::uint64_t> from_step;
    bool fresh = false;
    bool overwrite = false;
    bool dry_run = false;
    bool list = false;
    bool help = false;
};

struct settings {
    model_settings model;
    training_settings training;
    pccheck_settings pccheck;
    run_settings run;
    command_settings command;

    bool wants_monitor() const { return pccheck.use_monitor || !run.monitor.empty(); }
    std::filesystem::path checkpoint_dir() const {
        return run.checkpoint_dir.empty() ? std::filesystem::path(run.output_dir) / "checkpoints" : std::filesystem::path(run.checkpoint_dir);
    }
};

/// The two commands that take these settings.
enum class settings_command { bench, train };

/// What the command line and the configuration file said, before a scenario is laid under it.
struct given_settings {
    settings_command command = settings_command::bench;
    std::vector<std::pair<std::string, std::string>> file;  ///< option name -> value
    std::vector<std::pair<std::string, std::string>> flags;
    std::string file_path;

    bool has(std::string_view option) const;
};

/// Reads the command line, and the configuration file that it names; throws usage_error. Values are checked by resolve().
given_settings read_settings(settings_command command, std::vector<std::string> const& args);

/// default < scenario < file < flag, each value checked for its range; throws usage_error. `scenario` may be empty or
/// one of small, medium, large, frequency, monitor.
settings resolve(given_settings const& given, std::string const& scenario);

/// Checks what depends on more than one value, and what this build or machine cannot do; throws usage_error.
void check_settings(settings const& s, settings_command command);

/// Sections model, training, pccheck and run of a result's `config`.
nlohmann::json to_json(settings const& s);
/// The settings that to_json wrote; for handing them to a child process.
settings settings_from_json(nlohmann::json const& sections);

/// The options, grouped, with defaults and units.
std::string settings_help(settings_command command);

when_busy busy_mode(settings const& s);
prepare_mode preparation(settings const& s);

/// Bytes of a checkpoint of that model with Adam, without the file's header; what trainer and --dry-run agree on.
std::uint64_t estimated_checkpoint_bytes(settings const& s);
/// Bytes that training itself needs: parameters, gradients, optimizer state, activations roughly.
std::uint64_t estimated_training_bytes(settings const& s);

}  // namespace varve::tool
