#pragma once

#include <algorithm>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stop_token>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/checkpointer_options.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/detail/save_job.hpp"
#include "varve/error.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"

namespace varve::detail {

/// The saves on their way, and what the rooms of the pipeline tell each other about them.
///
/// Any thread uses it. The mutex guards all that is not const and says nothing else; it is not held while a staging copies,
/// a sink writes or an observer listens. Here is only what more than one room needs: how a save ends early, and how a block ends.
template <class Staging, class Sink>
struct save_line {
    using job_type = save_job<Staging, Sink>;
    using job_ptr = std::shared_ptr<job_type>;
    using block_type = typename job_type::block_in_flight;
    using buffer_type = typename Staging::buffer_type;
    using token_type = typename Staging::token_type;
    using snapshot_type = typename snapshot_of<Staging>::type;

    /// What the training thread asks about a layer; it does not walk through the layer's tensors again.
    struct layer_copies {
        std::uint64_t bytes = 0;
        std::size_t uncopied = 0;          ///< saves that have announced it and not copied it yet, or not put it aside
        std::vector<token_type> copies{};  ///< that were issued since the last update
        bool busy = false;                 ///< announced since the last update; the training thread's
    };

    struct staged_block {
        job_ptr job;
        std::size_t index;
    };

    save_line(varve::state const& s, image laid_out, std::size_t block_bytes, copy_moment when, checkpointer_options const& o)
        : state(s), options(o), copies(when), layout(std::move(laid_out)), map(layout, s, block_bytes),
          blocks_at_once(std::max<std::uint64_t>(1, o.batch_bytes / block_bytes)), layers(s.layers.size()) {
        for (std::size_t l = 0; l < layers.size(); ++l) {
            for (auto const& t : s.layers[l].tensors) layers[l].bytes += t.size_bytes();
            // Of a snapshot, and of the save before it: without memory for more the thread that puts layers aside could not say so.
            layers[l].copies.reserve(2);
        }
    }

    std::size_t blocks() const noexcept { return map.blocks().size(); }
    std::size_t most_writing() const noexcept { return std::max<std::size_t>(1, options.writing_at_once); }

    job_ptr make_job() {
        auto job = std::make_shared<job_type>(layers.size(), blocks());
        job->line = this;
        return job;
    }

    void wake_all() {
        {
            std::lock_guard lock(mutex);
        }
        take_work.notify_all();
        copy_work.notify_all();
        layer_copied.notify_all();
        commit_work.notify_all();
        idle.notify_all();
    }

    // ---- how a save ends early ----

    /// Ends it with that outcome; false if it was over already. Without the mutex.
    bool abandon(job_ptr const& job, std::error_code why) {
        std::vector<std::size_t> held;
        {
            [[maybe_unused]] snapshot_type free;
            std::lock_guard lock(mutex);
            if (job->error || job->committing || std::find(jobs.begin(), jobs.end(), job) == jobs.end()) return false;
            lose(*job, why, held, free);
        }
        release(*job, held);
        return true;
    }

    /// The first error stays. Called while one of the save's blocks is open, or by its target, so that the save outlives the call.
    void fail(job_type& job, std::error_code why) {
        std::vector<std::size_t> held;
        {
            std::lock_guard lock(mutex);
            set_error(job, why);
            held.swap(job.held);
        }
        release(job, held);
    }

    /// The first error stays, and for a lost save no buffer is waited for. With the mutex held.
    void set_error(job_type& job, std::error_code why) {
        if (!job.error) job.error = why;
        if (wants_buffer == &job) give_up.request_stop();
    }

    /// Marks a save as lost, with the mutex held; `held` and `free` are to be let go without it.
    void lose(job_type& job, std::error_code why, std::vector<std::size_t>& held, [[maybe_unused]] snapshot_type& free) {
        set_error(job, why);
        held.swap(job.held);
        // At once, since the copying thread may wait for a buffer that only comes with the next save's end.
        if (!job.filling && !job.copied) end_copying(job);
        if (job.open_blocks == 0 && !job.taking) free = std::exchange(job.snapshot, {});
    }

    /// Ends the writes that a lost save's blocks were still waiting for.
    void release(job_type& job, std::vector<std::size_t> const& held) {
        for (auto b : held) end_of(job.blocks[b]);
        wake_all();
    }

    /// Nothing of this save is copied any more: its announced layers are free. With the mutex held.
    void end_copying(job_type& job) {
        job.copied = true;
        if (!job.error) return;
        for (std::size_t l = 0; l < layers.size() && !job.by_snapshot; ++l) {
            auto last = map.last_part_of(l);
            if (!job.points[l] || last == block_map::npos) continue;
            auto reached = job.next_block < blocks() ? map.blocks()[job.next_block].first_part + job.next_part : last + 1;
            if (last >= reached) --layers[l].uncopied;
        }
    }

    /// A save that may have to give way is not copied from its snapshot before its turn: the next one takes the snapshot over at
    /// once, and what never gets to the sink does not use up the way there. With the mutex held.
    bool stays_aside(job_type const& job) const {
        return options.busy == when_busy::replace && job.by_snapshot && job.place == turn::waiting && writing >= most_writing();
    }

    /// A block's copies from a snapshot are over, so that what they follow is: its layers were put aside, and no update need wait
    /// for that any longer. With the mutex held.
    void forget_taken([[maybe_unused]] job_type const& job, [[maybe_unused]] block_type const& block) {
        if constexpr (std::equality_comparable<token_type>) {
            if (!job.by_snapshot) return;
            token_type const* last = nullptr;
            for (auto const& part : map.parts(map.blocks()[block.index])) {
                auto const& token = *job.taken[part.layer];
                if (last && *last == token) continue;
                for (auto& l : layers) std::erase(l.copies, token);
                last = &token;
            }
        }
    }

    /// A save's copies from the tensors are over. Whoever saves without an update between waits for none of them, and they would
    /// become more with each save. With the mutex held.
    void forget_copies([[maybe_unused]] job_type const& job) {
        if constexpr (std::equality_comparable<token_type>)
            for (auto const& block : job.blocks) {
                // A token for each layer in the block, in their order.
                auto token = block.copies.begin();
                auto last = layers.size();
                for (auto const& part : map.parts(map.blocks()[block.index])) {
                    if (part.layer == last) continue;
                    if (token == block.copies.end()) break;
                    last = part.layer;
                    std::erase(layers[last].copies, *token++);
                }
            }
    }

    // ---- how a block ends ----

    /// One of a block's two ends has come: with the second its buffer is free. Nothing of the job is touched afterwards.
    void end_of(block_type& block) {
        buffer_type free;
        {
            std::lock_guard lock(mutex);
            if (--block.open_ends > 0) return;
            free = std::move(block.buffer);
            auto& job = *block.job;
            // Woken under the lock: a committer that takes the job away cannot destroy what is notified here. And nobody for
            // nothing: a thread that wakes costs the training's processors more than the work that it would find.
            if (job.open_blocks-- == blocks_at_once) copy_work.notify_one();
            if (job.over()) commit_work.notify_one();
        }
    }

    /// Whether a worker has a block to take. With the mutex held.
    bool has_staged() const { return !staged.empty() && !(one_waits && staged.front().job->hashed_aside); }

    varve::state const& state;
    checkpointer_options const options;
    copy_moment const copies;
    image const layout;
    block_map const map;
    std::size_t const blocks_at_once;  ///< of one save, between the tensors and the sink
    bool hashes = true;                ///< whether the digests are made here; set before there are threads
    std::stop_source cancel;           ///< of waiting for buffers, for good

    mutable std::mutex mutex;
    std::condition_variable_any take_work, copy_work, staged_work, commit_work;  ///< for the taker, the copier, the workers, the committer
    std::condition_variable layer_copied, idle;                                  ///< for the training thread
    std::deque<job_ptr> jobs;                                                    ///< in step order, until they are committed or lost
    job_type const* newest = nullptr;                                            ///< the one that was begun last; only to be compared
    /// The next save's, made by the copying thread. In a training that makes and frees small objects by the thousand, a single
    /// allocation of more than a kilobyte costs 0.1 ms: the C library puts all that was freed together first.
    job_ptr spare;
    job_type const* wants_buffer = nullptr;  ///< the copier waits for a buffer for it, until give_up
    std::stop_source give_up{std::nostopstate};
    std::deque<staged_block> staged;  ///< from the copier to the workers
    /// A worker waits for the copies of a block whose digests are made elsewhere. The next block's are over after this one's, so
    /// the others need not wait as well: each signal of a GPU wakes every thread that waits for one.
    bool one_waits = false;
    std::vector<layer_copies> layers;
    std::size_t writing = 0;  ///< saves whose turn it is
    bool cancelling = false;  ///< what was handed over is not waited for any longer
};

}  // namespace varve::detail
