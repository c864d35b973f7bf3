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

    /// The method, with its store at the monitor; good as long as this. Throws as the entry's own start does.
    std::unique_ptr<running_method> start(method_entry const& entry, libtorch::training_state& training, method_settings s);
    /// Whether it is reached over TCP: the store is a name there, no folder here.
    bool is_over_tcp() const;
    /// Whether it was here before: it goes on afterwards.
    bool is_external() const;
    /// Call it once the method is gone: waits until the monitor has ended with it. Where no method was started, a monitor that was
    /// started for it ends at once, and one that was found is left alone.
    void end();

private:
    class impl;
    std::shared_ptr<impl> impl_;
};

}  // namespace varve::tool
