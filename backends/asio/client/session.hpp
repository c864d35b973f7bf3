#pragma once

#include <boost/asio/steady_timer.hpp>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "dialogue.hpp"
#include "relayed_save.hpp"
#include "transport/silence.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/loan.hpp"

namespace varve::asio::client {

struct session_settings {
    std::chrono::milliseconds silence{15'000};
    std::vector<std::byte const*> regions{};  ///< where those of the pool begin; none: blocks are sent
    std::size_t piece_bytes = 0;              ///< the most that one BLOCK_DATA brings
};

/// A connection to a monitor that has welcomed this run. One thread runs it; the rest is called on any.
class session : public std::enable_shared_from_this<session> {
public:
    using loans = std::map<std::pair<std::uint32_t, std::uint64_t>, loan>;

    session(std::unique_ptr<dialogue> open, wire::welcome const& greeting, session_settings settings);
    session(session const&) = delete;
    session& operator=(session const&) = delete;

    /// Until the connection is lost, or finish() is over: then nothing is in flight any more. Returns the loans that the
    /// monitor had not ended.
    loans run() noexcept;
    /// Once run() has returned, on its thread: waits for the monitor to end a connection that it has refused to go on with.
    void await_end(std::chrono::milliseconds limit) noexcept;
    /// Whether it was the monitor that ended the connection: it has died, or reads what was lent no more.
    bool ended_by_monitor() const noexcept { return ended_by_monitor_; }
    /// Once run() has returned, on its thread.
    void close() noexcept;
    /// Sends what is queued and goodbye, and waits until the monitor has let go of what was lent, for at most that long; run()
    /// returns then.
    void finish(std::chrono::milliseconds limit) noexcept;

    wire::welcome const& greeting() const noexcept { return greeting_; }
    bool is_lost() const noexcept;
    std::string why_lost() const;
    bool saw_durable() const noexcept { return saw_durable_; }
    bool saw_commit() const noexcept { return saw_commit_; }

    /// Throws errc::monitor_lost.
    std::shared_ptr<relayed_save> begin(std::uint64_t id, std::uint64_t step, completion lost);
    /// By reference where the block is in the pool and on loan.
    void write(std::uint64_t id, std::uint64_t offset_bytes, block const& b, completion done, loan kept) noexcept;
    /// Returns false where the connection is lost.
    bool commit(std::uint64_t id, commit_values const& values, std::span<std::uint64_t const> chunk_digests);
    void abandon(std::uint64_t id) noexcept;
    void forget(std::uint64_t id) noexcept;
    void set_draining(bool on) noexcept;

private:
    /// A message, and the bytes that are sent behind it from where they are.
    struct outgoing {
        std::vector<std::byte> head;
        std::span<std::byte const> behind{};
        completion done{};
        loan kept{};
    };

    template <class Message>
    static outgoing outgoing_of(Message const& m, std::span<std::byte const> behind = {});
    /// Of a save its BEGIN, its blocks, and at last, `ends`, its COMMIT or ABANDON. False where the connection is lost.
    bool enqueue(std::vector<outgoing> items, std::optional<std::uint64_t> save = {}, bool ends = false);
    outgoing* next_locked();
    bool nothing_queued_locked() const;
    void wake_locked();
    std::error_code lend(std::uint64_t id, std::uint64_t offset_bytes, block const& b, loan kept);
    bool send(std::uint64_t id, std::uint64_t offset_bytes, block const& b, completion done, loan kept);
    void process();
    void pump();
    void take(wire::message type, std::span<std::byte const> payload);
    std::shared_ptr<relayed_save> find(std::uint64_t id);
    void watch_silence();
    void lose(std::string const& why, bool leave_open = false) noexcept;

    std::unique_ptr<dialogue> dialogue_;
    session_settings const settings_;
    wire::welcome const greeting_;
    boost::asio::steady_timer watch_, end_;
    silence silence_;            ///< of the monitor; the running thread's
    std::uint64_t next_number_;  ///< of the frames sent; the running thread's
    std::vector<outgoing> writing_;

    /// Blocks that are sent need credit, which comes back when a save before them is committed: they wait for its last message, not
    /// the other way round.
    struct payload {
        std::deque<outgoing> queue{};
        bool ended = false;
    };

    mutable std::mutex mutex_;
    std::deque<outgoing> queue_;                 ///< what goes out at once
    std::map<std::uint64_t, payload> payloads_;  ///< of saves whose blocks are sent, the oldest first
    std::optional<outgoing> last_;               ///< GOODBYE, behind everything
    std::uint64_t credit_;
    bool woken_ = false, finishing_ = false, lost_ = false;
    std::string why_;
    std::map<std::uint64_t, std::shared_ptr<relayed_save>> saves_;
    loans loans_;
    std::atomic<bool> saw_durable_{false}, saw_commit_{false}, ended_by_monitor_{false};
    // The running thread's.
    bool left_open_ = false, awaiting_ = false;
    std::array<std::byte, 4096> rest_;  ///< what comes when nobody reads it any more
};

}  // namespace varve::asio::client
