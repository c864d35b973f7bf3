#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "varve/asio/monitor/monitor.hpp"
#include "varve/asio/wire.hpp"
#include "varve/error.hpp"

#include "held_store.hpp"
#include "kept_image.hpp"
#include "lingering_images.hpp"
#include "memory_budget.hpp"
#include "replica.hpp"

namespace varve::asio::server {

class session;

/// A checkpoint to be fetched, open for reading.
struct found_image {
    std::uint64_t step = 0, sequence = 0, size_bytes = 0;
    bool in_memory = false;
    std::string name;
    file_descriptor file;
    memory_budget::lease lease{};  ///< where it was brought into memory for this
};

/// What a connection ends with for an error that is none of ours: there is no memory, say.
error cannot_go_on(std::exception const& e);

/// What a monitor's sessions share: the stores, the memory, and what lingers. Thread-safe.
class core : public std::enable_shared_from_this<core> {
public:
    explicit core(monitor_options options);
    ~core();

    void listen();
    void run();
    void stop();
    std::vector<address> where() const;
    std::string status() const;

    monitor_options const& options() const noexcept { return options_; }
    boost::asio::io_context& context() noexcept { return context_; }
    void log(std::string const& line) const {
        if (options_.log) options_.log(line);
    }

    /// How a session is told what came of attach; called on any thread, does no more than post.
    struct attached {
        std::function<void(std::shared_ptr<held_store>, wire::welcome const&)> good;  ///< the store is null but for a trainer
        std::function<void(error const&)> refused;
        std::function<void(notice)> tell;
        std::function<void()> let_go;  ///< once the store has ended: the trainer's pool is read no more
        std::function<bool()> still_there;
        session const* who = nullptr;  ///< to be told from others
        std::string peer;
    };
    /// Opens the store of a trainer, or waits until what is asked for can be fetched.
    void attach(wire::hello hello, std::vector<file_descriptor> regions, bool over_network, attached call);
    /// The trainer's connection has ended; `farewell` where it said so.
    void detach(std::shared_ptr<held_store> const& store, bool farewell);
    void ended(session* s);
    /// Memory for a large greeting while it is read. Throws std::errc::not_enough_memory.
    memory_budget::lease lend_for_greeting(std::uint64_t bytes);

    /// Nothing where there is no such checkpoint. `store` is what HELLO said; `held` the trainer's own, or null. `at_peer_too`: the
    /// peer, which may have a newer one, or one that is not here, is asked. Throws error where the monitor is ending.
    void find(std::string const& store, bool over_network, bool at_peer_too, std::shared_ptr<held_store> held, wire::fetch const& what,
              std::function<void(std::optional<found_image>)> good, std::function<void(error const&)> refused);
    /// Calls it on a thread that may wait for a disk: those that serve the connections do not.
    void read_from_disk(std::function<void()> call);

private:
    /// What somebody has said who has come.
    struct arrival {
        wire::hello hello;
        std::vector<file_descriptor> regions;
        bool over_network = false;
        attached call;
    };
    struct waiting {
        std::filesystem::path path;
        std::uint64_t id = 0;
        arrival who;
    };

    void start(boost::asio::thread_pool& on, std::function<void()> call);
    void accept(std::size_t listener);
    void look_up(arrival a);
    void attach_next(session const* who);
    bool is_there(session const* who) const;
    void attach_to(std::filesystem::path const& path, arrival a);
    void wait_for_store(std::filesystem::path const& path, bool busy, arrival a);
    void attach_trainer(std::filesystem::path const& path, wire::hello hello, std::vector<file_descriptor> regions, attached call);
    trainer_pool pool_of(wire::hello const& hello, std::vector<file_descriptor> descriptors) const;
    memory_budget::lease take_memory(std::filesystem::path const& path, wire::hello const& hello);
    void store_opened(std::filesystem::path const& path, std::shared_ptr<held_store> const& store, opened_store const& found, bool fresh,
                      attached const& call);
    void replicate(std::filesystem::path const& path, wire::hello const& run, opened_store const& found);
    std::optional<found_image> find_here(std::filesystem::path const& path, held_store const* held, wire::fetch const& what);
    std::vector<std::uint64_t> steps_here(std::filesystem::path const& path, held_store const* held);
    std::optional<found_image> find_at_either(std::filesystem::path const& path, held_store const* held, wire::fetch const& what);
    void store_closed(std::filesystem::path const& path, std::unique_ptr<kept_image> kept);
    void tell_if_lost(std::filesystem::path const& path, kept_image const& image) const;
    void look_if_over();

    monitor_options const options_;
    boost::asio::io_context context_;
    boost::asio::strand<boost::asio::io_context::executor_type> const news_;  ///< of the stores' threads
    std::optional<boost::asio::executor_work_guard<boost::asio::io_context::executor_type>> work_;
    std::vector<std::unique_ptr<listener>> listeners_;
    std::vector<address> where_;
    boost::asio::steady_timer first_trainer_, farewell_;
    memory_budget budget_, greetings_;

    mutable std::mutex mutex_;
    std::set<std::shared_ptr<session>> sessions_;
    std::map<std::filesystem::path, std::shared_ptr<held_store>> stores_;
    lingering_images lingering_;
    std::map<std::filesystem::path, std::shared_ptr<replica>> replicas_;  ///< of stores that have been open, with a peer
    std::set<client::relay*> asking_;                                     ///< the peer, for somebody
    std::map<session const*, arrival> arrived_;                           ///< whose path has not been looked at yet
    std::vector<waiting> waiting_;
    std::uint64_t last_waiting_ = 0;
    bool stopping_ = false, had_trainer_ = false;
    boost::asio::thread_pool readers_, askers_;  ///< wait for a disk, and for the peer
};

}  // namespace varve::asio::server
