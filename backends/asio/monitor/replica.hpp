#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

#include "client/relay.hpp"
#include "varve/asio/transport.hpp"
#include "varve/asio/wire.hpp"
#include "varve/state.hpp"

#include "memory_budget.hpp"

namespace varve::asio::server {

/// A checkpoint that is committed in a store of this monitor.
struct local_checkpoint {
    std::uint64_t step = 0, sequence = 0;
};

struct replica_settings {
    address peer;
    std::shared_ptr<tls_context const> tls;
    std::chrono::milliseconds retry_every{3'000};
    std::filesystem::path store;
    wire::hello run;  ///< the trainer's
    /// The memory that it sends with, while the peer is there; nothing where there is no room for it.
    std::function<std::optional<memory_budget::lease>()> memory;
    std::function<void(std::string const&)> log;
    std::function<void()> ended;  ///< the last call, on its own thread
};

/// A store's second copy: what its trainer commits here is sent to the peer, another host's monitor, as a trainer of that one.
///
/// Nobody waits for it: it reads the committed file, on a thread of its own. One checkpoint is sent at a time, and the next is the
/// newest there is then, so a slow peer gets fewer. A peer that is away is tried again and again. A file that is open is never
/// written again by its store (see slot_pool), so one that is let go meanwhile is still sent whole. Thread-safe.
class replica {
public:
    static std::uint64_t const memory_bytes;

    /// `newest`: what stands in the store already. `before`: the one that this one takes the place of, cancelled, or null; its end is
    /// waited for on this one's thread, and it is left alone where this one cannot be made. Throws error.
    replica(replica_settings settings, std::optional<local_checkpoint> newest, std::shared_ptr<replica>& before);
    /// Cancels.
    ~replica();
    replica(replica const&) = delete;
    replica& operator=(replica const&) = delete;

    /// Older ones than were offered before are passed over.
    void offer(local_checkpoint c);
    /// No more will be offered: it ends when the peer has the newest, however long that takes.
    void finish();
    /// The same, for at most that long, and for as long as the peer is there.
    void finish_within(std::chrono::milliseconds limit);
    /// Ends in mid save; what was sent of it is discarded there.
    void cancel();
    bool over() const;
    void describe(nlohmann::json& out) const;

private:
    using clock = std::chrono::steady_clock;

    void run() noexcept;
    bool reach() noexcept;
    void greeted(wire::welcome const& there);
    void trouble(std::string const& why);
    bool send_newest() noexcept;
    void send(local_checkpoint const& c);
    // With the mutex held.
    bool peer_is_ahead() const noexcept { return there_.welcomed_step > highest_step_; }
    bool has_work() const noexcept { return newest_ && !settled_ && !peer_is_ahead(); }
    bool is_finished() const noexcept;

    replica_settings settings_;
    std::shared_ptr<replica> before_;
    state tensors_;
    client::relay relay_;
    bool introduced_ = false;                   ///< its own thread's, like the next two
    std::shared_ptr<client::session> session_;  ///< the one that was greeted last
    std::optional<memory_budget::lease> memory_;

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::optional<local_checkpoint> newest_;
    bool settled_ = false;  ///< the peer has `newest_`, or it is no more
    std::uint64_t highest_step_ = 0;
    bool finishing_ = false, cancelled_ = false, over_ = false;
    std::optional<clock::time_point> deadline_;
    bool tried_ = false, connected_ = false, said_ahead_ = false;
    std::string why_;  ///< not connected, or nothing is sent
    struct {
        std::uint64_t welcomed_step = 0, crash_safe_step = 0, durable_step = 0, sent = 0, bytes = 0;
        std::uint64_t durable_sequence = 0;  ///< here
        std::optional<std::uint64_t> sending;
        std::chrono::nanoseconds sending_time{};
    } there_;

    std::jthread thread_;
};

}  // namespace varve::asio::server
