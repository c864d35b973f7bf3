#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "varve/concepts/scheduling.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/observer.hpp"
#include "varve/state.hpp"

namespace varve::detail {

/// Where a save comes in: begins it, takes word of its layers, passes them on, and tells when a layer may be updated. The
/// training thread's alone; what it does here is what a save costs the training.
template <staging Staging, sink Sink>
class announcer {
public:
    using line_type = save_line<Staging, Sink>;
    using job_type = typename line_type::job_type;
    using job_ptr = typename line_type::job_ptr;
    using order_type = typename Staging::order_type;
    using token_type = typename Staging::token_type;

    announcer(line_type& line, Staging& staging) : line_(line), staging_(staging) {}

    job_ptr begin(std::uint64_t step) {
        typename line_type::snapshot_type aside;
        if constexpr (snapshotting_staging<Staging>) aside = staging_.acquire_snapshot();
        job_ptr job;
        {
            std::lock_guard lock(line_.mutex);
            job = std::move(line_.spare);
        }
        if (!job) job = line_.make_job();
        job->start(step, std::move(aside));
        if constexpr (snapshot_digesting_staging<Staging>) job->hashed_aside = job->by_snapshot && line_.hashes && staging_.digests_snapshots();
        line_.options.observers.on({.what = milestone::begin, .step = step, .bytes = line_.layout.size_bytes});
        std::lock_guard lock(line_.mutex);
        line_.jobs.push_back(job);
        line_.newest = job.get();
        return job;
    }

    /// Without the mutex: only this thread announces.
    bool is_announced(job_type const& job, std::size_t layer) const { return job.points[layer].has_value(); }

    /// The layers' tensors hold what the save is to hold, once the work in `order` is done.
    void announce(job_type& job, std::span<std::size_t const> layers, order_type order) {
        if (layers.empty()) return;
        auto point = staging_.record(order);
        auto const now_ns = line_.options.observers.now_ns();
        for (auto layer : layers) {
            auto const bytes = line_.layers[layer].bytes;
            line_.options.observers.on(
                {.what = milestone::layer_ready, .step = job.step(), .time_ns = now_ns, .bytes = bytes, .layer = line_.state.layers[layer].name});
            job.untaken_bytes += bytes;
        }
        bool aside = false;
        {
            std::lock_guard lock(line_.mutex);
            if (job.error) return;
            for (auto layer : layers) {
                job.points[layer] = point;
                if (line_.map.last_part_of(layer) == block_map::npos) continue;
                auto& l = line_.layers[layer];
                if (!std::exchange(l.busy, true)) ++busy_layers_;
                if (job.by_snapshot)
                    job.untaken.push_back(layer);
                else
                    ++l.uncopied;
            }
            if (line_.copies != copy_moment::at_layer_ready) return;
            if (job.by_snapshot) {
                if (job.passed_on || job.untaken_bytes < line_.layout.data_bytes() / 2) return;
                aside = pass_to_taker(job);
            }
        }
        (aside ? line_.take_work : line_.copy_work).notify_one();
    }

    void seal(job_type& job, metadata_map metadata) {
        bool over = false, aside = false;
        {
            std::lock_guard lock(line_.mutex);
            aside = pass_to_taker(job);
            job.metadata = std::move(metadata);
            job.sealed = true;
            job.ticket->seal();
            over = job.over();
        }
        // A wake costs the training thread more than all of the above.
        (aside ? line_.take_work : line_.copy_work).notify_one();
        if (over) line_.commit_work.notify_one();
    }

    /// Why a layer may not be updated.
    struct refusal {
        std::error_code error;
        std::size_t layer;
    };

    /// Returns when nothing that reads the layers' tensors can be overtaken by work that `order` gets from now on. What is refused
    /// is waited for when it is called again.
    std::optional<refusal> before_update(std::span<std::size_t const> layers, order_type order) {
        if (auto refused = order_behind(layers, order)) return refused;
        // Nothing came meanwhile: only this thread announces.
        std::lock_guard lock(line_.mutex);
        for (auto layer : layers) {
            auto& l = line_.layers[layer];
            l.copies.clear();
            if (std::exchange(l.busy, false)) --busy_layers_;
        }
        return {};
    }

    /// The same for work that is no update: updates wait all the same.
    std::optional<refusal> order_behind(std::span<std::size_t const> layers, order_type order) {
        copies_.clear();
        {
            std::unique_lock lock(line_.mutex);
            for (auto layer : layers) {
                auto& l = line_.layers[layer];
                line_.layer_copied.wait(lock, [&] { return l.uncopied == 0; });
                for (auto const& token : l.copies)
                    if (!repeats(token)) copies_.push_back({layer, token});
            }
        }
        for (auto const& copy : copies_)
            if (auto const ec = staging_.order_after(copy.token, order)) return refusal{ec, copy.layer};
        // A host has waited itself; its tokens, which cannot be told apart, are not forgotten one by one.
        if constexpr (!std::equality_comparable<token_type> && std::is_empty_v<order_type>) {
            std::lock_guard lock(line_.mutex);
            for (auto layer : layers) line_.layers[layer].copies.clear();
        }
        return {};
    }

    /// Whether the two above have anything to wait for: a layer was announced since its last update.
    bool busy(std::span<std::size_t const> layers) const noexcept {
        return busy_layers_ != 0 && std::any_of(layers.begin(), layers.end(), [&](auto layer) { return line_.layers[layer].busy; });
    }

private:
    struct layer_copy {
        std::size_t layer;
        token_type token;
    };

    /// One snapshot has many layers.
    bool repeats([[maybe_unused]] token_type const& token) const {
        if constexpr (std::equality_comparable<token_type>)
            return !copies_.empty() && copies_.back().token == token;
        else
            return false;
    }

    /// Has the layers put aside that were announced and are not yet in the save's snapshot; false if there are none. A layerwise
    /// save comes here when half of its bytes are announced, while others are still being updated, and at seal: each time costs
    /// the training thread a wake, and all of the copies within the GPU take less than the update. With the mutex held.
    bool pass_to_taker(job_type& job) {
        job.untaken_bytes = 0;
        if (job.error) job.untaken.clear();
        if (job.untaken.empty()) return false;
        for (auto layer : job.untaken) ++line_.layers[layer].uncopied;
        job.to_take.insert(job.to_take.end(), job.untaken.begin(), job.untaken.end());
        job.untaken.clear();
        job.passed_on = true;
        return true;
    }

    line_type& line_;
    Staging& staging_;
    std::size_t busy_layers_ = 0;     ///< announced since their last update
    std::vector<layer_copy> copies_;  ///< scratch, kept since allocations cost (see save_line::spare)
};

}  // namespace varve::detail
