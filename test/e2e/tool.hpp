#pragma once

#include <sys/types.h>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

/// What the end-to-end tests share: running the command (its path is in the environment's VARVE_TOOL) and reading what it leaves.
namespace varve_test {

struct outcome {
    int code = 0;  ///< 128 + signal number if a signal ended it
    std::string out, err;
};

/// The command in a process of its own. bench and train run on the CPU unless the arguments name a device.
class running_tool {
public:
    explicit running_tool(std::vector<std::string> const& args);
    ~running_tool();
    running_tool(running_tool const&) = delete;
    running_tool& operator=(running_tool const&) = delete;

    void signal(int number) const;
    /// Whether it ended within that time.
    bool ends_within(std::chrono::milliseconds time);
    /// Waits until that holds; false where it ends before.
    bool comes_to(std::function<bool()> const& condition);
    /// The same of two events that it has written there.
    bool comes_to_write_events(std::filesystem::path const& file);
    outcome wait();

private:
    bool collect(int options);

    std::filesystem::path out_, err_;
    pid_t pid_ = -1;
    int status_ = 0;
    bool ended_ = false;
};

outcome run_tool(std::vector<std::string> const& args);
/// Whether this build, on this machine, can run a method; a dry run tells.
bool runs_here(std::string const& method, std::string const& device = "cpu");

/// Whether the command can train on a GPU here.
bool tool_has_gpu();
/// The same for a test that needs one; where there is none, the running test is skipped.
bool have_tool_gpu();

/// A folder that is gone with the object.
class temporary_folder {
public:
    temporary_folder();
    ~temporary_folder();
    temporary_folder(temporary_folder const&) = delete;
    temporary_folder& operator=(temporary_folder const&) = delete;

    std::filesystem::path const& path() const { return path_; }
    std::string operator/(std::string const& name) const { return (path_ / name).string(); }

private:
    std::filesystem::path path_;
};

/// The whole lines of an events file, from its byte `from` on; a kill may leave the beginning of a line, which is left out.
std::vector<nlohmann::json> read_events(std::filesystem::path const& file, std::uintmax_t from = 0);
/// Steps of the events of that name, in the file's order.
std::vector<std::uint64_t> steps_of(std::filesystem::path const& file, std::string const& event, std::uintmax_t from = 0);
/// The greatest of some steps, 0 of none.
std::uint64_t largest(std::vector<std::uint64_t> const& steps);
/// The losses in an events file, step by step; a step that is there more than once must have the same loss each time.
std::map<std::uint64_t, double> losses_in(std::filesystem::path const& file);
std::string read_text(std::filesystem::path const& file);
nlohmann::json read_json(std::filesystem::path const& file);
/// Steps of the checkpoints in a store, ascending, by their files' names.
std::vector<std::uint64_t> stored_steps(std::filesystem::path const& store);
/// The newest step's file.
std::string newest_file(std::filesystem::path const& store);
/// `varve verify` finds every checkpoint of the store whole.
void expect_whole(std::filesystem::path const& store);

/// Options of a model that trains a step in a few hundredths of a second, with more behind them.
std::vector<std::string> tiny_model(std::vector<std::string> const& more = {});
/// Trains, and saves in every step, a model whose step takes a few milliseconds.
std::vector<std::string> every_step_run(std::string const& store, std::string const& events, std::uint64_t steps,
                                        std::vector<std::string> const& more, std::string const& method = "layerwise");
/// Those of the methods that can run here.
std::vector<std::string> runnable(std::vector<std::string> const& methods);
std::vector<std::string> joined(std::vector<std::string> first, std::vector<std::string> const& second);

/// Whether the tool's LibTorch has that update on a CPU.
bool has_update(std::string const& name);

std::size_t line_count(std::string const& text);

}  // namespace varve_test
