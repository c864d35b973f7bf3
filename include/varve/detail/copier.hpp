#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <stop_token>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/block_writer.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/image.hpp"
#include "varve/observer.hpp"

namespace varve::detail {

/// From the tensors, or from the snapshot that was taken of them, into buffers: waits for the next layer to be announced and
/// for a buffer, has the staging fill it, and queues the full block for the workers. One thread's, the copying thread's; it
/// never holds more than one unfinished buffer, so any pool makes progress.
template <staging Staging, sink Sink>
class copier {
public:
    using line_type = save_line<Staging, Sink>;
    using job_type = typename line_type::job_type;
    using job_ptr = typename line_type::job_ptr;
    using block_type = typename line_type::block_type;

    copier(line_type& line, Staging& staging, block_writer<Staging, Sink>& writer) : line_(line), staging_(staging), writer_(writer) {
        std::size_t most = 0;
        for (auto const& b : line_.map.blocks()) most = std::max(most, line_.map.parts(b).size());
        ranges_.reserve(most);
    }

    /// Copies until it is to stop.
    void run(std::stop_token stop) {
        std::unique_lock lock(line_.mutex);
        for (;;) {
            if (!line_.spare) make_spare(lock);
            job_ptr job;
            if (!line_.copy_work.wait(lock, stop, [&] { return (job = next_to_copy()) != nullptr; })) return;
            if (job->error || job->next_block == line_.blocks()) {
                drop_unfinished(*job, lock);
                line_.end_copying(*job);
                lock.unlock();
                if (line_.blocks() == 0) finish_empty(*job);
                line_.wake_all();
                lock.lock();
                continue;
            }
            if (job->next_part > 0 || open_block(job, lock)) copy_parts(job, lock);
        }
    }

private:
    // Called with the mutex held, but for what says otherwise; a function that takes the lock lets it go meanwhile.

    /// Without memory for one, begin makes its own and says so.
    void make_spare(std::unique_lock<std::mutex>& lock) {
        lock.unlock();
        job_ptr fresh;
        try {
            fresh = line_.make_job();
        } catch (std::bad_alloc const&) {
        }
        lock.lock();
        line_.spare = std::move(fresh);
    }

    /// The oldest save whose next part may be copied, or which was abandoned before it was.
    job_ptr next_to_copy() const {
        for (auto const& job : line_.jobs) {
            if (job->copied) continue;
            if (job->error) return job;
            if (job->next_block == line_.blocks()) {
                if (job->sealed) return job;
                return nullptr;
            }
            return may_copy(*job, next_part(*job)) && (job->next_part > 0 || (has_room(*job) && !line_.stays_aside(*job))) ? job : nullptr;
        }
        return nullptr;
    }
    block_part const& next_part(job_type const& job) const { return line_.map.parts(line_.map.blocks()[job.next_block])[job.next_part]; }
    bool may_copy(job_type const& job, block_part const& part) const {
        if (job.by_snapshot) return job.taken[part.layer].has_value();
        return job.points[part.layer].has_value() && (line_.copies == copy_moment::at_layer_ready || job.sealed);
    }
    /// What was put aside at once lies side by side, and is copied at once.
    static bool go_together(job_type const& job, std::size_t layer, std::size_t other) {
        if (layer == other) return true;
        if constexpr (std::equality_comparable<typename Staging::token_type>)
            return job.by_snapshot && job.taken[other] == job.taken[layer];
        else
            return false;
    }
    bool has_room(job_type const& job) const { return job.open_blocks < line_.blocks_at_once; }
    /// Waits for a buffer for the save's next block; false if the save is lost or the pipeline closes.
    bool open_block(job_ptr const& job, std::unique_lock<std::mutex>& lock) {
        lock.unlock();
        writer_.hand_on_turns();
        lock.lock();
        if (job->error) return false;  // its turn has come, and nobody to write it
        lock.unlock();
        typename Staging::buffer_type buffer{};
        try {
            // Here, and not at begin: fresh memory costs the training thread a page fault for each 4 KiB.
            if (job->next_block == 0) job->chunk_digests.resize(chunk_count(line_.layout.data_bytes()));
            {
                std::lock_guard inner(line_.mutex);
                job->blocks[job->next_block].copies.reserve(line_.map.parts(line_.map.blocks()[job->next_block]).size());
            }
            buffer = acquire_for(*job);
        } catch (std::bad_alloc const&) {
            line_.abandon(job, std::make_error_code(std::errc::not_enough_memory));
        }
        lock.lock();
        if (!buffer || job->error) return false;
        auto& block = job->blocks[job->next_block];
        block.job = job.get();
        block.index = job->next_block;
        block.buffer = std::move(buffer);
        block.open_ends = 2;
        ++job->open_blocks;
        job->filling = true;
        return true;
    }

    /// Empty if the pipeline closes, or the save is lost: what a receiver keeps on loan may come back much later, or never.
    typename Staging::buffer_type acquire_for(job_type const& job) {
        if constexpr (!relaying_sink<Sink>) {
            return staging_.acquire(line_.cancel.get_token());
        } else {
            std::stop_source give_up;
            std::stop_callback closing(line_.cancel.get_token(), [&] { give_up.request_stop(); });
            {
                std::lock_guard lock(line_.mutex);
                if (job.error) return {};
                line_.wants_buffer = &job;
                line_.give_up = give_up;
            }
            auto buffer = staging_.acquire(give_up.get_token());
            std::lock_guard lock(line_.mutex);
            line_.wants_buffer = nullptr;
            line_.give_up = std::stop_source(std::nostopstate);
            return buffer;
        }
    }

    /// Copies what may be copied of the next block.
    void copy_parts(job_ptr const& job, std::unique_lock<std::mutex>& lock) {
        auto const& plan = line_.map.blocks()[job->next_block];
        auto parts = line_.map.parts(plan);
        auto& block = job->blocks[job->next_block];
        while (job->next_part < parts.size() && !job->error && may_copy(*job, parts[job->next_part])) {
            auto layer = parts[job->next_part].layer;
            ranges_.clear();
            std::size_t end = job->next_part;
            for (; end < parts.size() && go_together(*job, layer, parts[end].layer); ++end) ranges_.push_back(parts[end].range);
            lock.unlock();
            auto token = copy_layer(*job, block, layer);
            bool layer_done = plan.first_part + end == line_.map.last_part_of(layer) + 1;
            lock.lock();
            block.copies.push_back(token);
            job->next_part = end;
            if (job->by_snapshot) continue;
            try {
                line_.layers[layer].copies.push_back(token);
            } catch (std::bad_alloc const&) {
                lock.unlock();
                token.wait();
                lock.lock();
            }
            if (!layer_done) continue;
            --line_.layers[layer].uncopied;
            lock.unlock();
            line_.layer_copied.notify_all();
            line_.options.observers.on({.what = milestone::layer_copied, .step = job->step(), .layer = line_.state.layers[layer].name});
            lock.lock();
        }
        if (job->error || job->next_part < parts.size()) return;
        if (job->next_block + 1 == line_.blocks()) hash_snapshot(*job, lock);
        if (job->error) return;
        try {
            line_.staged.push_back({job, job->next_block});
        } catch (std::bad_alloc const&) {
            lock.unlock();
            line_.abandon(job, std::make_error_code(std::errc::not_enough_memory));
            lock.lock();
            return;
        }
        job->filling = false;
        ++job->next_block;
        job->next_part = 0;
        if (line_.has_staged()) line_.staged_work.notify_one();
    }

    /// Has the staging fill the next part's layer into the block, from its tensors or from the snapshot; without the mutex.
    typename Staging::token_type copy_layer(job_type& job, block_type& block, std::size_t layer) {
        if constexpr (snapshotting_staging<Staging>) {
            if (job.by_snapshot) {
                auto const& first = ranges_.front();
                auto const& last = ranges_.back();
                auto const at = line_.map.blocks()[block.index].offset_bytes - line_.layout.header_bytes + first.buffer_offset_bytes;
                return staging_.copy(block.buffer, first.buffer_offset_bytes, job.snapshot, at,
                                     last.buffer_offset_bytes + last.size_bytes - first.buffer_offset_bytes, *job.taken[layer]);
            }
        }
        return staging_.copy(block.buffer, ranges_, *job.points[layer]);
    }

    /// Where the digests are made of the snapshot: while the last block keeps it.
    void hash_snapshot([[maybe_unused]] job_type& job, [[maybe_unused]] std::unique_lock<std::mutex>& lock) {
        if constexpr (snapshot_digesting_staging<Staging>) {
            if (!job.hashed_aside) return;
            lock.unlock();
            if (auto ec = staging_.digest(job.snapshot, job.chunk_digests)) line_.fail(job, ec);
            lock.lock();
        }
    }

    /// A save that was lost half way through a block gives the buffer back once nothing copies into it: neither of the
    /// block's ends will come.
    void drop_unfinished(job_type& job, std::unique_lock<std::mutex>& lock) {
        if (!std::exchange(job.filling, false)) return;
        auto& block = job.blocks[job.next_block];
        lock.unlock();
        for (auto const& token : block.copies) token.wait();
        block.buffer = {};
        lock.lock();
        --job.open_blocks;
    }

    /// A state without a byte has a header all the same. Without the mutex.
    void finish_empty(job_type& job) {
        line_.options.observers.on({.what = milestone::staged, .step = job.step()});
        job.ticket->reach(goal::staged);
        writer_.hand_on_turns();
    }

    line_type& line_;
    Staging& staging_;
    block_writer<Staging, Sink>& writer_;
    std::vector<copy_range> ranges_;  ///< scratch
};

}  // namespace varve::detail
