#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "varve/checkpointer_options.hpp"
#include "varve/concepts/format.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/announcer.hpp"
#include "varve/detail/block_worker.hpp"
#include "varve/detail/block_writer.hpp"
#include "varve/detail/committer.hpp"
#include "varve/detail/copier.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/detail/snapshot_taker.hpp"
#include "varve/detail/thread_name.hpp"
#include "varve/error.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"
#include "varve/ticket.hpp"

namespace varve::detail {

/// Takes announced layers to durable checkpoints, off the training thread.
///
/// A save passes these rooms, and its blocks go through them in the image's order:
///   - the announcer, on the training thread, takes word of its layers;
///   - the taker, on a thread of its own, has the staging put them aside, where there is a snapshot;
///   - the copier, on a thread of its own, has the staging fill buffers from the tensors or from the snapshot;
///   - the block_worker, on each of the workers, waits for a block's copies, submits its write when it is the save's turn, and
///     hashes it meanwhile; the block_writer, between it and the sink, hands the turns on;
///   - the committer, on a thread of its own, writes the header, syncs and commits, in step order. With a relaying sink it hands
///     saves over, in step order too, and tells what becomes of them, in the order in which that comes (see handover).
/// What they share is the save_line. Here are its threads, and what the training thread asks of the line as a whole.
template <staging Staging, sink Sink, fixed_layout_format Format>
class pipeline {
public:
    using line_type = save_line<Staging, Sink>;
    using job_type = typename line_type::job_type;
    using job_ptr = typename line_type::job_ptr;
    using order_type = typename Staging::order_type;

    pipeline(state const& s, Staging& staging, Sink& sink, Format const& format, store* files, copy_moment copies,
             checkpointer_options const& options, [[maybe_unused]] std::size_t in_flight)
        : line_(s, format.lay_out(s), staging.block_bytes(), copies, options), announcer_(line_, staging), writer_(line_, staging, sink, files),
          taker_(line_, staging), copier_(line_, staging, writer_), worker_(line_, staging, writer_), committer_(line_, writer_, format, files),
          sink_(sink) {
        if constexpr (relaying_sink<Sink>) {
            sink.introduce({s, line_.layout, format.extension(), staging.block_bytes(), in_flight, options.busy, Staging::memory});
            line_.hashes = sink.takes_digests();
        }
        if constexpr (snapshotting_staging<Staging>)
            taking_ = std::jthread([this](std::stop_token stop) {
                name_this_thread("varve-take");
                taker_.run(stop);
            });
        copying_ = std::jthread([this](std::stop_token stop) {
            name_this_thread("varve-copy");
            copier_.run(stop);
        });
        for (unsigned i = 0; i < std::max(1u, options.digest_workers); ++i)
            workers_.emplace_back([this](std::stop_token stop) {
                name_this_thread("varve-worker");
                worker_.run(stop);
            });
        committing_ = std::jthread([this](std::stop_token stop) {
            name_this_thread("varve-commit");
            committer_.run(stop);
        });
    }

    pipeline(pipeline const&) = delete;
    pipeline& operator=(pipeline const&) = delete;

    /// Drains for as long as the options say, then cancels; waits for writes that were submitted.
    ~pipeline() {
        drain_for(line_.options.drain_on_destroy);
        std::vector<job_ptr> rest;
        {
            std::lock_guard lock(line_.mutex);
            rest.assign(line_.jobs.begin(), line_.jobs.end());
            line_.cancelling = true;
        }
        line_.cancel.request_stop();
        for (auto& job : rest) abandon(job, errc::cancelled);
        line_.wake_all();
        std::unique_lock lock(line_.mutex);
        line_.idle.wait(lock, [&] { return line_.jobs.empty(); });
    }

    image const& layout() const noexcept { return line_.layout; }
    std::size_t blocks() const noexcept { return line_.blocks(); }

    // ---- called by the training thread: one save (see announcer) ----

    job_ptr begin(std::uint64_t step) { return announcer_.begin(step); }
    bool is_announced(job_type const& job, std::size_t layer) const { return announcer_.is_announced(job, layer); }
    void announce(job_type& job, std::span<std::size_t const> layers, order_type order) { announcer_.announce(job, layers, order); }
    void seal(job_type& job, metadata_map metadata) { announcer_.seal(job, std::move(metadata)); }
    using refusal = typename announcer<Staging, Sink>::refusal;
    std::optional<refusal> before_update(std::span<std::size_t const> layers, order_type order) { return announcer_.before_update(layers, order); }
    std::optional<refusal> order_behind(std::span<std::size_t const> layers, order_type order) { return announcer_.order_behind(layers, order); }
    bool busy(std::span<std::size_t const> layers) const noexcept { return announcer_.busy(layers); }
    /// Ends a save early with that outcome; false if it was over already.
    bool abandon(job_ptr const& job, std::error_code why) { return line_.abandon(job, why); }

    // ---- called by the training thread: all of them ----

    std::size_t in_flight() const {
        std::lock_guard lock(line_.mutex);
        return in_flight_locked();
    }

    /// Waits until fewer than `limit` saves are in flight.
    void wait_for_room(std::size_t limit) {
        std::unique_lock lock(line_.mutex);
        line_.idle.wait(lock, [&] { return in_flight_locked() < limit; });
    }

    /// Lets the newest save go that is staged and has not begun to write; false if there is none.
    bool replace_newest() {
        job_ptr victim;
        std::vector<std::size_t> held;
        {
            [[maybe_unused]] typename line_type::snapshot_type free;
            std::unique_lock lock(line_.mutex);
            // The next save takes its snapshot over, and gets it at once unless the taker is at it.
            line_.layer_copied.wait(lock, [&] { return !(victim = newest_that_waits_locked()) || !victim->taking; });
            if (!victim) return false;
            line_.lose(*victim, errc::replaced, held, free);
        }
        line_.release(*victim, held);
        return true;
    }

    void drain() {
        if (nothing_sealed()) return;
        draining hurry(sink_);
        std::unique_lock lock(line_.mutex);
        line_.idle.wait(lock, [&] { return nothing_sealed_locked(); });
    }

    void wait_until_durable(ticket const& save) {
        draining hurry(sink_);
        save.durable().wait();
    }

private:
    /// For as long as it lives nothing is held back on its way to the disk. No lock of the line's is held when it begins or ends.
    class draining {
    public:
        explicit draining(Sink& sink) noexcept : sink_(sink) { tell(true); }
        ~draining() { tell(false); }
        draining(draining const&) = delete;
        draining& operator=(draining const&) = delete;

    private:
        void tell([[maybe_unused]] bool on) noexcept {
            if constexpr (pacing_sink<Sink>) sink_.set_draining(on);
        }
        [[maybe_unused]] Sink& sink_;
    };

    job_ptr newest_that_waits_locked() const {
        auto const waits = [&](auto const& job) {
            return job->sealed && job->place == turn::waiting && !job->error && (job->by_snapshot || job->blocks_staged == blocks());
        };
        auto const it = std::find_if(line_.jobs.rbegin(), line_.jobs.rend(), waits);
        return it == line_.jobs.rend() ? nullptr : *it;
    }
    std::size_t in_flight_locked() const {
        // The receiver of a relaying sink lets the newest win by itself.
        bool const leaves_when_safe = line_.options.busy == when_busy::replace;
        return static_cast<std::size_t>(
            std::count_if(line_.jobs.begin(), line_.jobs.end(), [&](auto const& j) { return !j->error && !(j->safe && leaves_when_safe); }));
    }
    bool nothing_sealed() const {
        std::lock_guard lock(line_.mutex);
        return nothing_sealed_locked();
    }
    bool nothing_sealed_locked() const {
        return std::none_of(line_.jobs.begin(), line_.jobs.end(), [](auto const& j) { return j->sealed || j->error; });
    }
    void drain_for(std::chrono::milliseconds limit) {
        // Longer ones do not fit behind the clock's now, and would be over at once.
        limit = std::min<std::chrono::milliseconds>(limit, std::chrono::hours(24 * 365));
        if (nothing_sealed()) return;
        draining hurry(sink_);
        std::unique_lock lock(line_.mutex);
        line_.idle.wait_for(lock, limit, [&] { return nothing_sealed_locked(); });
    }

    line_type line_;
    announcer<Staging, Sink> announcer_;
    block_writer<Staging, Sink> writer_;
    snapshot_taker<Staging, Sink> taker_;
    copier<Staging, Sink> copier_;
    block_worker<Staging, Sink> worker_;
    committer<Staging, Sink, Format> committer_;
    Sink& sink_;

    std::jthread taking_, copying_;  ///< last, like those below: they use all of the above
    std::vector<std::jthread> workers_;
    std::jthread committing_;
};

}  // namespace varve::detail
