#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>

#include "varve/asio/shared_pool.hpp"
#include "varve/asio/transport.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/store.hpp"

namespace varve::asio {

namespace client {
class relay;
class relayed_save;
}  // namespace client

struct monitor_sink_options {
    /// The staging's memory, where the monitor is on this host: blocks are then named and not sent.
    std::shared_ptr<shared_pool> pool;
    /// For the monitor's store: keep, keep_every, prepare, wait_until_prepared, fresh, overwrite and made_by count.
    store_options files{};
    std::shared_ptr<tls_context const> tls{};  ///< over TCP; none: loopback alone
    /// Starts a monitor where none can be reached, and returns once it may be tried again; empty: nobody does. Called on
    /// the checkpointer's threads, one at a time.
    std::function<void()> respawn{};
    std::chrono::milliseconds connect_limit{5'000};  ///< for a connection, and for each message on its way
    /// For the welcome: opening a store reads its newest checkpoints, and a monitor first finishes what an earlier connection left.
    std::chrono::milliseconds welcome_limit{60'000};
    std::chrono::milliseconds silence_limit{15'000};  ///< a monitor, which pings, is lost when it says nothing for so long
    /// A monitor that could not be reached is not tried before, nor before four times what the last try took.
    std::chrono::milliseconds retry_after{1'000};
    /// From the begin of a save's write to that of the next, for when_busy::replace; 0: as soon as the disk is free. The saves between are
    /// crash-safe and give way to newer ones. Takes room for three checkpoints in the pool, over TCP in the monitor's memory, and has no
    /// effect with less. Nothing is held back while the checkpointer drains or a sync save waits, nor once this process is gone; whoever
    /// else waits for a save's durable() may wait as long as the interval.
    std::chrono::milliseconds durable_interval{0};
    /// For the end of a sink whose blocks the monitor still has: it finishes what is crash-safe, copies the newest checkpoint,
    /// and lets go of the pool. What it has not let go of by then is not filled again for as long as there is the pool.
    std::chrono::milliseconds goodbye_limit{5'000};
};

/// Hands checkpoints to a monitor, a process on this host or another that commits them and outlives this one.
///
/// On a Unix socket, with a staging in shared memory (see shared_pool), no byte of a tensor is sent: the monitor reads the
/// staging's blocks where they are, and a block is filled again only once the monitor has let go of it. Elsewhere blocks
/// are sent, as many at once as the monitor has room for. When the monitor is lost the saves in flight fail with
/// errc::monitor_lost, and training goes on; the next save finds, or has somebody start, another one. Blocks on loan come back
/// once they are read no more: with the welcome of the next connection, or with the monitor's end.
///
///     auto pool = std::make_shared<varve::asio::shared_pool>(pool_bytes, block_bytes);
///     varve::checkpointer ck(state, varve::host_staging(pool->memory(), block_bytes, pool), varve::async<2>{},
///                            varve::asio::monitor_sink(varve::asio::parse_address("unix:/run/varve"), "/data/run", {.pool = pool}));
class monitor_sink {
public:
    /// The open end of one save. Destroying one that was not handed over tells the monitor that it is not wanted.
    class target_type {
    public:
        target_type(target_type&&) noexcept;
        target_type& operator=(target_type&&) noexcept;
        ~target_type();

        /// Sends the bytes; by reference it answers errc::unsupported, since the monitor reads blocks later.
        void write(std::uint64_t offset_bytes, block const& b, completion done) noexcept;
        /// By reference the loan is kept until the monitor lets the block go; else the bytes are sent, and it is given back.
        void write(std::uint64_t offset_bytes, block const& b, completion done, loan kept) noexcept;
        /// Commits are the monitor's: errc::unsupported.
        std::error_code sync() noexcept { return errc::unsupported; }
        void hand_over(commit_values const& values, std::span<std::uint64_t const> chunk_digests, completion crash_safe, completion durable) noexcept;

    private:
        friend class monitor_sink;
        explicit target_type(std::shared_ptr<client::relayed_save> save) noexcept;
        std::shared_ptr<client::relayed_save> save_;
    };

    /// `store` is the folder of the checkpoints: a path on a Unix socket, a name below the monitor's own over TCP. Nothing is
    /// connected yet.
    monitor_sink(address where, std::string store, monitor_sink_options options = {});
    monitor_sink(monitor_sink&&) noexcept;
    monitor_sink& operator=(monitor_sink&&) noexcept;
    /// Says goodbye, and waits for the blocks that the monitor has, for at most goodbye_limit. What it has whole it commits all
    /// the same.
    ~monitor_sink();

    /// The slot of a region of the shared pool; `unregistered` for other memory and over TCP, where blocks are sent.
    int register_memory(std::span<std::byte> region);
    /// Connects. Throws what the monitor refuses the run with (errc::store_locked, mismatch, not_a_store, or the system's),
    /// errc::monitor_lost where there is none, errc::unsupported for GPU memory that is not the shared pool's, and
    /// std::errc::invalid_argument for a durable_interval without when_busy::replace.
    void introduce(relayed_run const& run);
    /// Whether blocks are sent: by reference the monitor hashes them.
    bool takes_digests() const noexcept;
    /// Begins a save; connects again if need be. Throws errc::monitor_lost.
    target_type open(open_request const& r);
    /// See pacing_sink.
    void set_draining(bool on) noexcept;

    /// The newest checkpoint that the monitor has, in memory or on disk, on a connection of its own.
    std::optional<fetched_checkpoint> fetch(std::optional<std::uint64_t> step, std::uint32_t skip);

    sink_limits limits() const noexcept;
    /// GPU memory too, where it is the pool's: then it is not sent.
    static constexpr bool accepts(memory_kind) noexcept { return true; }
    std::string describe() const;

private:
    std::unique_ptr<client::relay> relay_;
};

static_assert(pacing_sink<monitor_sink> && registering_sink<monitor_sink> && fetching_sink<monitor_sink>);

}  // namespace varve::asio
