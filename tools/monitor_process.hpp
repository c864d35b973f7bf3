#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "methods.hpp"
#include "settings.hpp"

namespace varve::tool {

/// The monitor that owns a run's store: one that runs already, or one that is started here, in a session of its own, so that
/// neither a kill nor Ctrl-C takes it along.
class monitor_of_run {
public:
    /// Starts one where --monitor names none, unless one that outlived an earlier run of this store is there: then that one
    /// serves, and what lingers in it. `linger_seconds` is for one that is started. Throws error where none can be had.
    /// `say` gets a line for the user, on any thread. Over TCP a store is a name among those of others' runs: `name`, or the folder's.
    monitor_of_run(settings const& s, std::filesystem::path const& store, std::uint64_t linger_seconds, std::function<void(std::string const&)> say,
                   std::string const& name = {});
    /// As end().
    ~monitor_of_run();
    monitor_of_run(monitor_of_run const&) = delete;
    monitor_of_run& operator=(monitor_of_run const&) = delete;

    /// A name that no run has but one of this machine in that folder.
    static std::string name_of_its_own(std::filesystem::path const& store);

    /// For method_settings; good as long as this.
    std::shared_ptr<monitor_use const> use() const;
    /// Whether it was here before: it goes on afterwards.
    bool is_external() const;
    /// Call it once the method is gone: waits until the monitor that was started has ended with it.
    void end();

private:
    class impl;
    std::shared_ptr<impl> impl_;
};

}  // namespace varve::tool
