#pragma once

#include <algorithm>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <semaphore>
#include <span>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "varve/checkpointer_options.hpp"
#include "varve/concepts/format.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/save_job.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"

namespace varve::detail {

/// Takes announced layers to durable checkpoints, off the training thread.
///
/// A save passes three kinds of threads, and its blocks go through them in the image's order:
///   - one copies: it waits for the next layer to be announced and for a buffer, and has the staging fill it, from the
///     tensors or from the snapshot that the training thread had the staging take of them;
///   - the workers wait for a block's copies, submit its write when it is the save's turn, and hash it meanwhile;
///   - one commits: it writes the header, syncs and commits, in step order, and hands the turn on. With a relaying sink it
///     hands saves over, in step order too, and tells what becomes of them, in the order in which that comes.
/// The copying thread never holds more than one unfinished buffer, so any pool makes progress.
template <staging Staging, sink Sink, fixed_layout_format Format>
class pipeline {
public:
    using job_type = save_job<Staging, Sink>;
    using job_ptr = std::shared_ptr<job_type>;
    using order_type = typename Staging::order_type;

    pipeline(state const& s, Staging& staging, Sink& sink, Format const& format, store* files, copy_moment copies, checkpointer_options const& options,
             [[maybe_unused]] std::size_t in_flight)
        : state_(s), staging_(staging), sink_(sink), format_(format), files_(files), copies_(copies), options_(options), image_(format.lay_out(s)),
          map_(image_, s, staging.block_bytes()), layers_(s.layers.size()),
          blocks_per_save_(std::max<std::uint64_t>(1, options.batch_bytes / staging.block_bytes())) {
        for (auto region : staging_.regions()) {
            if constexpr (registering_sink<Sink>)
                slots_.push_back(sink_.register_memory(region));
            else
                slots_.push_back(unregistered);
        }
        if constexpr (relaying_sink<Sink>) {
            sink_.introduce({state_, image_, format_.extension(), staging_.block_bytes(), in_flight, options_.busy});
            hashes_ = sink_.takes_digests();
        }
        copier_ = std::jthread([this](std::stop_token stop) { copy_loop(stop); });
        for (unsigned i = 0; i < std::max(1u, options_.digest_workers); ++i)
            workers_.emplace_back([this](std::stop_token stop) { work_loop(stop); });
        committer_ = std::jthread([this](std::stop_token stop) { commit_loop(stop); });
    }

    pipeline(pipeline const&) = delete;
    pipeline& operator=(pipeline const&) = delete;

    /// Drains for as long as the options say, then cancels; waits for writes that were submitted.
    ~pipeline() {
        drain_for(options_.drain_on_destroy);
        std::vector<job_ptr> rest;
        {
            std::lock_guard lock(mutex_);
            rest.assign(jobs_.begin(), jobs_.end());
            cancelling_ = true;
        }
        cancel_.request_stop();
        for (auto& job : rest) abandon(job, errc::cancelled);
        wake_all();
        std::unique_lock lock(mutex_);
        idle_.wait(lock, [&] { return jobs_.empty(); });
    }

    image const& layout() const noexcept { return image_; }
    std::size_t blocks() const noexcept { return map_.blocks().size(); }

    // ---- called by the training thread ----

    std::size_t in_flight() const {
        std::lock_guard lock(mutex_);
        return in_flight_locked();
    }

    /// Waits until fewer than `limit` saves are in flight.
    void wait_for_room(std::size_t limit) {
        std::unique_lock lock(mutex_);
        idle_.wait(lock, [&] { return in_flight_locked() < limit; });
    }

    /// Lets the newest save go that is staged and has not begun to write; false if there is none.
    bool replace_newest() {
        job_ptr victim;
        std::vector<std::size_t> held;
        {
            [[maybe_unused]] typename snapshot_of<Staging>::type free;
            std::lock_guard lock(mutex_);
            for (auto const& job : jobs_)
                if (job->sealed && job->place == turn::waiting && !job->error && (job->by_snapshot || (job->copied && job->blocks_staged == blocks())))
                    victim = job;
            if (!victim) return false;
            lose(*victim, errc::replaced, held, free);
        }
        release(*victim, held);
        return true;
    }

    job_ptr begin(std::uint64_t step) {
        typename snapshot_of<Staging>::type aside;
        if constexpr (snapshotting_staging<Staging>) aside = staging_.acquire_snapshot();
        auto job = std::make_shared<job_type>(step, state_.layers.size(), blocks(), chunk_count(image_.data_bytes()), std::move(aside));
        job->pipeline = this;
        options_.observers.on({.what = milestone::begin, .step = step, .bytes = image_.size_bytes});
        std::lock_guard lock(mutex_);
        jobs_.push_back(job);
        return job;
    }

    bool is_announced(job_type const& job, std::size_t layer) const {
        std::lock_guard lock(mutex_);
        return job.points[layer].has_value();
    }

    /// The layers' tensors hold what the save is to hold, once the work in `order` is done.
    void announce(job_type& job, std::span<std::size_t const> layers, order_type order) {
        if (layers.empty()) return;
        auto point = staging_.record(order);
        for (auto layer : layers) {
            std::uint64_t bytes = 0;
            for (auto const& t : state_.layers[layer].tensors) bytes += t.size_bytes();
            options_.observers.on({.what = milestone::layer_ready, .step = job.step(), .bytes = bytes, .layer = state_.layers[layer].name});
            job.untaken_bytes += bytes;
        }
        {
            std::lock_guard lock(mutex_);
            if (job.error) return;
            for (auto layer : layers) {
                job.points[layer] = point;
                if (map_.last_part_of(layer) == block_map::npos) continue;
                auto& l = layers_[layer];
                if (!std::exchange(l.busy, true)) ++busy_layers_;
                if (job.by_snapshot)
                    job.untaken.push_back(layer);
                else
                    ++l.uncopied;
            }
        }
        if (copies_ != copy_moment::at_layer_ready) return;
        if (!job.by_snapshot || job.untaken_bytes >= image_.data_bytes() / snapshot_shares) take(job);
        copy_work_.notify_one();
    }

    void seal(job_type& job, metadata_map metadata) {
        take(job);
        bool over = false;
        {
            std::lock_guard lock(mutex_);
            job.metadata = std::move(metadata);
            job.sealed = true;
            job.ticket->seal();
            over = job.over();
        }
        // A wake costs the training thread more than all of the above.
        copy_work_.notify_one();
        if (over) commit_work_.notify_one();
    }

    /// Returns when nothing that reads the layer's tensors can be overtaken by work that `order` gets from now on.
    /// `latest` is what `order` follows already, of layers before this one.
    std::error_code before_update(std::size_t layer, order_type order, std::optional<typename Staging::token_type>& latest) {
        if (busy_layers_ == 0) return {};
        std::vector<typename Staging::token_type> copies;
        {
            std::unique_lock lock(mutex_);
            auto& l = layers_[layer];
            layer_copied_.wait(lock, [&] { return l.uncopied == 0; });
            copies.swap(l.copies);
            if (std::exchange(l.busy, false)) --busy_layers_;
        }
        for (std::size_t i = 0; i < copies.size(); ++i) {
            // One snapshot has many layers.
            if constexpr (std::equality_comparable<typename Staging::token_type>)
                if (latest == copies[i]) continue;
            auto ec = staging_.order_after(copies[i], order);
            if (!ec) latest = copies[i];
            if (!ec) continue;
            // Whoever tries again, once the stream is no longer captured, waits for all of them.
            std::lock_guard lock(mutex_);
            auto& l = layers_[layer];
            l.copies.insert(l.copies.end(), copies.begin() + static_cast<std::ptrdiff_t>(i), copies.end());
            if (!std::exchange(l.busy, true)) ++busy_layers_;
            return ec;
        }
        return {};
    }

    /// Whether before_update has anything to wait for, for any layer.
    bool busy() const noexcept { return busy_layers_ != 0; }

    void drain() {
        std::unique_lock lock(mutex_);
        idle_.wait(lock, [&] { return nothing_sealed_locked(); });
    }

    /// Ends a save early with that outcome; false if it was over already.
    bool abandon(job_ptr const& job, std::error_code why) {
        std::vector<std::size_t> held;
        {
            [[maybe_unused]] typename snapshot_of<Staging>::type free;
            std::lock_guard lock(mutex_);
            if (job->error || job->committing || std::find(jobs_.begin(), jobs_.end(), job) == jobs_.end()) return false;
            lose(*job, why, held, free);
        }
        release(*job, held);
        return true;
    }

private:
    /// A layerwise save puts layers aside in about so many shares: one launch for each layer would cost more than it gains.
    static constexpr std::uint64_t snapshot_shares = 8;

    /// What before_update asks about a layer.
    struct layer_copies {
        std::size_t uncopied = 0;                            ///< saves that have announced it and not copied it yet
        std::vector<typename Staging::token_type> copies{};  ///< that were issued since the last update
        bool busy = false;                                   ///< announced since the last update; the training thread's
    };

    struct staged_block {
        job_ptr job;
        std::size_t index;
    };

    /// Marks a save as lost; `held` and `free` are to be let go without the mutex.
    void lose(job_type& job, std::error_code why, std::vector<std::size_t>& held, [[maybe_unused]] typename snapshot_of<Staging>::type& free) {
        job.error = why;
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

    std::size_t in_flight_locked() const {
        // The receiver of a relaying sink lets the newest win by itself.
        bool const leaves_when_safe = options_.busy == when_busy::replace;
        return static_cast<std::size_t>(
            std::count_if(jobs_.begin(), jobs_.end(), [&](auto const& j) { return !j->error && !(j->safe && leaves_when_safe); }));
    }
    bool nothing_sealed_locked() const {
        return std::none_of(jobs_.begin(), jobs_.end(), [](auto const& j) { return j->sealed || j->error; });
    }
    void drain_for(std::chrono::milliseconds limit) {
        std::unique_lock lock(mutex_);
        idle_.wait_for(lock, limit, [&] { return nothing_sealed_locked(); });
    }
    void wake_all() {
        { std::lock_guard lock(mutex_); }
        copy_work_.notify_all();
        layer_copied_.notify_all();
        commit_work_.notify_all();
        idle_.notify_all();
    }

    // ---- copying ----

    /// The oldest save whose next part may be copied, or which was abandoned before it was.
    job_ptr next_to_copy() const {
        for (auto const& job : jobs_) {
            if (job->copied) continue;
            if (job->error) return job;
            if (job->next_block == blocks()) {
                if (job->sealed) return job;
                return nullptr;
            }
            return may_copy(*job, next_part(*job)) && (job->next_part > 0 || (has_room(*job) && !stays_aside(*job))) ? job : nullptr;
        }
        return nullptr;
    }
    block_part const& next_part(job_type const& job) const { return map_.parts(map_.blocks()[job.next_block])[job.next_part]; }
    bool may_copy(job_type const& job, block_part const& part) const {
        if (job.by_snapshot) return job.taken[part.layer].has_value();
        return job.points[part.layer].has_value() && (copies_ == copy_moment::at_layer_ready || job.sealed);
    }
    bool has_room(job_type const& job) const { return job.open_blocks < blocks_per_save_; }
    /// A save that may have to give way is not copied from its snapshot before its turn: the next one takes the snapshot over at
    /// once, and what never gets to the sink does not use up the way there.
    bool stays_aside(job_type const& job) const {
        return options_.busy == when_busy::replace && job.by_snapshot && job.place == turn::waiting && writing_ >= options_.writing_at_once;
    }

    void copy_loop(std::stop_token stop) {
        std::unique_lock lock(mutex_);
        for (;;) {
            job_ptr job;
            if (!copy_work_.wait(lock, stop, [&] { return (job = next_to_copy()) != nullptr; })) return;
            if (job->error || job->next_block == blocks()) {
                drop_unfinished(*job, lock);
                end_copying(*job);
                lock.unlock();
                if (blocks() == 0) finish_empty(*job);
                wake_all();
                lock.lock();
                continue;
            }
            lock.unlock();
            if (job->next_part == 0) {
                hand_on_turns();
                auto buffer = staging_.acquire(cancel_.get_token());
                lock.lock();
                if (!buffer || job->error) continue;
                auto& block = job->blocks[job->next_block];
                block.job = job.get();
                block.pipeline = this;
                block.index = job->next_block;
                block.buffer = std::move(buffer);
                block.open_ends = 2;
                ++job->open_blocks;
                job->filling = true;
            } else {
                lock.lock();
            }
            copy_parts(job, lock);
        }
    }

    /// Puts the layers aside that were announced and are not yet in the save's snapshot; on the training thread.
    void take(job_type& job) {
        if constexpr (snapshotting_staging<Staging>) {
            auto const layers = std::exchange(job.untaken, {});
            job.untaken_bytes = 0;
            if (layers.empty()) return;
            // Announced one after the other, perhaps in several streams.
            std::vector<typename Staging::point_type> points;
            {
                std::lock_guard lock(mutex_);
                if (job.error) return;
                for (auto layer : layers) points.push_back(*job.points[layer]);
                job.taking = true;
            }
            auto token = staging_.take(job.snapshot, layers, points);
            {
                std::lock_guard lock(mutex_);
                for (auto layer : layers) {
                    job.taken[layer] = token;
                    layers_[layer].copies.push_back(token);
                }
                job.taking = false;
                if (job.error) commit_work_.notify_one();
            }
            for (auto layer : layers) options_.observers.on({.what = milestone::layer_copied, .step = job.step(), .layer = state_.layers[layer].name});
        }
    }

    /// Has the staging fill the next part's layer into the block, from its tensors or from the snapshot.
    typename Staging::token_type copy_layer(job_type& job, typename job_type::block_in_flight& block, std::size_t layer) {
        if constexpr (snapshotting_staging<Staging>) {
            if (job.by_snapshot) {
                auto const& first = ranges_.front();
                auto const& last = ranges_.back();
                auto const at = map_.blocks()[block.index].offset_bytes - image_.header_bytes + first.buffer_offset_bytes;
                return staging_.copy(block.buffer, first.buffer_offset_bytes, job.snapshot, at,
                                     last.buffer_offset_bytes + last.size_bytes - first.buffer_offset_bytes, *job.taken[layer]);
            }
        }
        return staging_.copy(block.buffer, ranges_, *job.points[layer]);
    }

    /// Copies what may be copied of the next block; takes and returns the lock held.
    void copy_parts(job_ptr const& job, std::unique_lock<std::mutex>& lock) {
        auto const& plan = map_.blocks()[job->next_block];
        auto parts = map_.parts(plan);
        auto& block = job->blocks[job->next_block];
        while (job->next_part < parts.size() && !job->error && may_copy(*job, parts[job->next_part])) {
            auto layer = parts[job->next_part].layer;
            ranges_.clear();
            std::size_t end = job->next_part;
            for (; end < parts.size() && parts[end].layer == layer; ++end) ranges_.push_back(parts[end].range);
            lock.unlock();
            auto token = copy_layer(*job, block, layer);
            bool layer_done = plan.first_part + end == map_.last_part_of(layer) + 1;
            lock.lock();
            block.copies.push_back(token);
            job->next_part = end;
            if (job->by_snapshot) continue;
            layers_[layer].copies.push_back(token);
            if (!layer_done) continue;
            --layers_[layer].uncopied;
            lock.unlock();
            layer_copied_.notify_all();
            options_.observers.on({.what = milestone::layer_copied, .step = job->step(), .layer = state_.layers[layer].name});
            lock.lock();
        }
        if (job->error || job->next_part < parts.size()) return;
        job->filling = false;
        staged_.push_back({job, job->next_block});
        ++job->next_block;
        job->next_part = 0;
        staged_work_.notify_one();
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

    /// Nothing of this save is copied any more: its announced layers are free.
    void end_copying(job_type& job) {
        job.copied = true;
        if (!job.error) return;
        for (std::size_t l = 0; l < layers_.size() && !job.by_snapshot; ++l) {
            auto last = map_.last_part_of(l);
            if (!job.points[l] || last == block_map::npos) continue;
            auto reached = job.next_block < blocks() ? map_.blocks()[job.next_block].first_part + job.next_part : last + 1;
            if (last >= reached) --layers_[l].uncopied;
        }
    }

    /// A state without a byte has a header all the same.
    void finish_empty(job_type& job) {
        options_.observers.on({.what = milestone::staged, .step = job.step()});
        job.ticket->reach(goal::staged);
        hand_on_turns();
    }

    // ---- writing and hashing ----

    void work_loop(std::stop_token stop) {
        std::unique_lock lock(mutex_);
        for (;;) {
            if (!staged_work_.wait(lock, stop, [&] { return !staged_.empty(); })) return;
            auto [job, index] = std::move(staged_.front());
            staged_.pop_front();
            lock.unlock();
            finish_staging(job, index);
            job.reset();
            lock.lock();
        }
    }

    void finish_staging(job_ptr const& job, std::size_t index) {
        auto& block = job->blocks[index];
        std::error_code failed;
        for (auto const& token : block.copies)
            if (auto ec = token.wait()) failed = ec;
        if (failed) fail(*job, failed);
        bool all_staged = false, write_now = false, lost = false;
        {
            [[maybe_unused]] typename snapshot_of<Staging>::type free;
            std::lock_guard lock(mutex_);
            all_staged = ++job->blocks_staged == blocks() && !job->error;
            if (all_staged) free = std::exchange(job->snapshot, {});
            lost = static_cast<bool>(job->error);
            write_now = job->place == turn::writing;
            if (!lost && !write_now) job->held.push_back(index);
        }
        if (all_staged) {
            options_.observers.on({.what = milestone::staged, .step = job->step(), .bytes = image_.size_bytes});
            job->ticket->reach(goal::staged);
        }
        if (lost) {
            end_of(block);
        } else if (write_now) {
            write(block);
        }
        hash(block);
        end_of(block);
    }

    void write(typename job_type::block_in_flight& block) {
        auto const& plan = map_.blocks()[block.index];
        options_.observers.on({.what = milestone::write, .step = block.job->step(), .bytes = plan.size_bytes});
        block_of_sink bytes{block.buffer.data(), plan.size_bytes, Staging::memory, slots_[block.buffer.region()]};
        completion const done{&pipeline::written, &block};
        if constexpr (relaying_sink<Sink> && lending_staging<Staging>)
            block.job->target->write(plan.offset_bytes, bytes, done, block.buffer.lend());
        else
            block.job->target->write(plan.offset_bytes, bytes, done);
    }

    static void written(void* context, std::error_code ec) noexcept {
        auto& block = *static_cast<typename job_type::block_in_flight*>(context);
        auto& self = *static_cast<pipeline*>(block.pipeline);
        if (ec) self.fail(*block.job, ec);
        self.end_of(block);
    }

    void hash(typename job_type::block_in_flight& block) {
        if (!hashes_) return;
        auto const& plan = map_.blocks()[block.index];
        auto first = (plan.offset_bytes - image_.header_bytes) / digest_chunk_bytes;
        auto out = std::span(block.job->chunk_digests).subspan(first);
        if constexpr (digesting_staging<Staging>) {
            if (auto ec = staging_.digest(block.buffer, plan.size_bytes, out)) fail(*block.job, ec);
        } else {
            chunk_digests({block.buffer.data(), plan.size_bytes}, out);
        }
    }

    /// The first error stays. Called while one of the save's blocks is open, so that the save outlives the call.
    void fail(job_type& job, std::error_code why) {
        std::vector<std::size_t> held;
        {
            std::lock_guard lock(mutex_);
            if (!job.error) job.error = why;
            held.swap(job.held);
        }
        release(job, held);
    }

    /// One of a block's two ends has come: with the second its buffer is free. Nothing of the job is touched afterwards.
    void end_of(typename job_type::block_in_flight& block) {
        typename job_type::buffer_type free;
        {
            std::lock_guard lock(mutex_);
            if (--block.open_ends > 0) return;
            free = std::move(block.buffer);
            --block.job->open_blocks;
            // Woken under the lock: a committer that takes the job away cannot destroy what is notified here.
            copy_work_.notify_one();
            commit_work_.notify_one();
        }
    }

    /// Opens targets for the saves whose turn it is, oldest first, and submits what they hold.
    void hand_on_turns() {
        for (;;) {
            job_ptr job;
            {
                std::lock_guard lock(mutex_);
                if (writing_ >= options_.writing_at_once) return;
                auto it = std::find_if(jobs_.begin(), jobs_.end(), [](auto const& j) { return j->place == turn::waiting && !j->error; });
                if (it == jobs_.end()) return;
                job = *it;
                job->place = turn::opening;
                ++writing_;
            }
            std::error_code failed;
            try {
                if (files_) {
                    job->file = files_->acquire();
                    job->target.emplace(sink_.open({files_->folder(), job->file->name, image_.size_bytes, job->step()}));
                } else {
                    job->target.emplace(sink_.open({-1, {}, image_.size_bytes, job->step()}));
                }
            } catch (error const& e) {
                failed = e.code();
            } catch (std::exception const&) {
                failed = std::make_error_code(std::errc::not_enough_memory);
            }
            std::vector<std::size_t> held;
            bool lost = false;
            {
                std::lock_guard lock(mutex_);
                if (failed && !job->error) job->error = failed;
                lost = static_cast<bool>(job->error);
                job->place = turn::writing;
                held.swap(job->held);
            }
            for (auto b : held) lost ? end_of(job->blocks[b]) : write(job->blocks[b]);
            wake_all();
        }
    }

    // ---- committing ----

    void commit_loop(std::stop_token stop) {
        std::unique_lock lock(mutex_);
        for (;;) {
            job_ptr job;
            // Lost saves leave at once, whole ones in their order.
            auto next = [&] {
                bool first = true;
                for (auto const& j : jobs_) {
                    if (j->place == turn::handed) {
                        if (j->has_news() || cancelling_) return j;
                        continue;
                    }
                    if (j->over() && (j->error || (first && j->place == turn::writing))) return j;
                    first = false;
                }
                return job_ptr{};
            };
            if (!commit_work_.wait(lock, stop, [&] { return (job = next()) != nullptr; })) return;
            bool const handed = job->place == turn::handed;
            job->committing = true;
            if (job->place == turn::writing) --writing_;
            lock.unlock();
            if (handed) {
                tell_news(job);
            } else {
                // The next one's blocks are on their way while this one's header and its commit are waited for.
                hand_on_turns();
                bring_in(job);
            }
            lock.lock();
        }
    }

    void bring_in(job_ptr const& job) {
        if constexpr (relaying_sink<Sink>) {
            if (!job->error) return hand_over(*job);
        }
        finish(job);
    }

    // ---- with a relaying sink ----

    /// From here on the save is the receiver's; its turn is over.
    void hand_over(job_type& job) {
        job.snapshot = {};
        {
            std::lock_guard lock(mutex_);
            job.place = turn::handed;
        }
        std::span<std::uint64_t const> digests;
        if (hashes_) digests = job.chunk_digests;
        job.target->hand_over({job.step(), 0, job.metadata}, digests, {&pipeline::came<&job_type::safe_came>, &job},
                              {&pipeline::came<&job_type::end_came>, &job});
    }

    /// Kept for the committing thread, so that observers take none of the sink's time, and what is told is told in order.
    template <auto Answer>
    static void came(void* context, std::error_code ec) noexcept {
        auto& job = *static_cast<job_type*>(context);
        auto& self = *static_cast<pipeline*>(job.pipeline);
        std::lock_guard lock(self.mutex_);
        job.*Answer = ec;
        // Woken under the lock: with the second answer the job is the committing thread's.
        self.commit_work_.notify_one();
    }

    /// Tells what has become of a save that was handed over; with none of it, it is cancelled.
    void tell_news(job_ptr const& job) {
        std::unique_lock lock(mutex_);
        bool const cancelled = !job->has_news();
        if (cancelled) {
            lock.unlock();
            job->target.reset();  // no answer comes after this
            lock.lock();
        }
        bool const safe = !job->safe_told && job->safe_came && !*job->safe_came;
        job->safe_told = job->safe_came.has_value();
        auto const end = job->end_came;
        lock.unlock();
        if (safe) {
            options_.observers.on({.what = milestone::written, .step = job->step(), .bytes = image_.size_bytes});
            job->ticket->reach(goal::written);
            options_.observers.on({.what = milestone::crash_safe, .step = job->step(), .bytes = image_.size_bytes});
            job->ticket->reach(goal::crash_safe);
            lock.lock();
            job->safe = true;
            lock.unlock();
            idle_.notify_all();
        }
        if (!end && !cancelled) return;
        job->target.reset();
        conclude(job, end ? *end : make_error_code(errc::cancelled));
    }

    // ---- with any other ----

    void finish(job_ptr const& job) {
        std::error_code outcome = job->error;
        bool synced = true;
        if (!outcome) outcome = write_header(*job);
        if (!outcome) {
            options_.observers.on({.what = milestone::written, .step = job->step(), .bytes = image_.size_bytes});
            job->ticket->reach(goal::written);
            outcome = job->target->sync();
            synced = !outcome;
        }
        job->target.reset();
        job->snapshot = {};
        if (job->file) {
            try {
                if (outcome)
                    files_->give_back(std::move(*job->file), synced);
                else
                    outcome = files_->commit(std::move(*job->file), job->step(), sequence_);
            } catch (std::exception const&) {
                if (!outcome) outcome = std::make_error_code(std::errc::not_enough_memory);
            }
        }
        if (!outcome) job->ticket->reach(goal::crash_safe);
        conclude(job, outcome);
    }

    /// The save ends with that outcome, and is forgotten.
    void conclude(job_ptr const& job, std::error_code outcome) {
        auto what = !outcome ? milestone::durable : outcome == errc::replaced ? milestone::replaced : milestone::failed;
        options_.observers.on({.what = what, .step = job->step(), .bytes = outcome ? 0 : image_.size_bytes, .error = outcome});
        if (outcome)
            job->ticket->fail(outcome);
        else
            job->ticket->reach(goal::durable);
        {
            std::lock_guard lock(mutex_);
            std::erase(jobs_, job);
            // With no save in flight no copy is on its way, and a caller who never asks does not gather tokens.
            if (std::all_of(jobs_.begin(), jobs_.end(), [](auto const& j) { return j->place == turn::handed; }))
                for (auto& l : layers_) l.copies.clear();
        }
        wake_all();
    }

    std::error_code write_header(job_type& job) {
        try {
            sequence_ = files_ ? files_->next_sequence() : sequence_ + 1;
            auto bytes = format_.header(state_, image_, {job.step(), sequence_, job.metadata}, job.chunk_digests);
            aligned_bytes header(bytes);
            struct answer {
                std::binary_semaphore came{0};
                std::error_code error{};
            } a;
            job.target->write(0, {header.data(), header.size(), memory_kind::host, unregistered},
                              {[](void* context, std::error_code ec) noexcept {
                                   auto& to = *static_cast<answer*>(context);
                                   to.error = ec;
                                   to.came.release();
                               },
                               &a});
            a.came.acquire();
            return a.error;
        } catch (error const& e) {
            return e.code();
        } catch (std::exception const&) {
            return std::make_error_code(std::errc::not_enough_memory);
        }
    }

    using block_of_sink = varve::block;

    state const& state_;
    Staging& staging_;
    Sink& sink_;
    Format const& format_;
    store* const files_;
    copy_moment const copies_;
    checkpointer_options const options_;
    image const image_;
    block_map const map_;
    std::vector<int> slots_;          ///< of the staging's regions, as the sink registered them
    std::vector<copy_range> ranges_;  ///< the copying thread's scratch

    mutable std::mutex mutex_;
    std::condition_variable_any copy_work_, staged_work_, commit_work_;
    std::condition_variable layer_copied_, idle_;
    std::deque<job_ptr> jobs_;  ///< in step order, until they are committed or lost
    std::deque<staged_block> staged_;
    std::vector<layer_copies> layers_;
    std::size_t busy_layers_ = 0;  ///< that are busy; the training thread's
    std::size_t const blocks_per_save_;
    std::size_t writing_ = 0;
    bool hashes_ = true;       ///< whether the digests are made here
    bool cancelling_ = false;  ///< what was handed over is not waited for any longer
    std::uint64_t sequence_ = 0;  ///< the committing thread's
    std::stop_source cancel_;

    std::jthread copier_;
    std::vector<std::jthread> workers_;
    std::jthread committer_;
};

}  // namespace varve::detail
