#pragma once

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <stop_token>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/observer.hpp"
#include "varve/state.hpp"

namespace varve::detail {

/// From the tensors into snapshots: has the staging put aside what the announcer passes on. One thread's. It is not the
/// training's, which would pay for every call of the device, nor the copying one, which waits for buffers while updates wait for this.
template <staging Staging, sink Sink>
class snapshot_taker {
public:
    using line_type = save_line<Staging, Sink>;
    using job_type = typename line_type::job_type;
    using job_ptr = typename line_type::job_ptr;

    snapshot_taker(line_type& line, Staging& staging) : line_(line), staging_(staging) {
        layers_.reserve(line.layers.size());
        points_.reserve(line.layers.size());
    }

    /// Puts layers aside until it is to stop.
    void run(std::stop_token stop)
        requires snapshotting_staging<Staging>
    {
        std::unique_lock lock(line_.mutex);
        for (;;) {
            job_ptr job;
            if (!line_.take_work.wait(lock, stop, [&] { return (job = next()) != nullptr; })) return;
            layers_.assign(job->to_take.begin(), job->to_take.end());
            job->to_take.clear();
            if (!job->error) take(*job, lock);
            for (auto layer : layers_) --line_.layers[layer].uncopied;
            line_.layer_copied.notify_all();
            // Nobody for nothing, see save_line::end_of.
            if (job->over()) line_.commit_work.notify_one();
            if (job->next_part > 0 || !line_.stays_aside(*job)) line_.copy_work.notify_one();
        }
    }

private:
    /// The oldest save that has layers to be put aside. With the mutex held.
    job_ptr next() const {
        auto it = std::find_if(line_.jobs.begin(), line_.jobs.end(), [](auto const& job) { return !job->to_take.empty(); });
        return it == line_.jobs.end() ? nullptr : *it;
    }

    /// Lets the lock go meanwhile.
    void take(job_type& job, std::unique_lock<std::mutex>& lock) {
        // They may have been announced one after the other, perhaps in several streams.
        for (auto layer : layers_) points_.push_back(*job.points[layer]);
        job.taking = true;
        lock.unlock();
        auto token = staging_.take(job.snapshot, layers_, points_);
        points_.clear();
        // Before the copies may come: they are told in this order.
        auto const now_ns = line_.options.observers.now_ns();
        for (auto layer : layers_)
            line_.options.observers.on(
                {.what = milestone::layer_copied, .step = job.step(), .time_ns = now_ns, .layer = line_.state.layers[layer].name});
        lock.lock();
        for (auto layer : layers_) {
            job.taken[layer] = token;
            line_.layers[layer].copies.push_back(token);
        }
        job.taking = false;
    }

    line_type& line_;
    Staging& staging_;
    // Scratch, with room for all: without memory this thread could not say so.
    std::vector<std::size_t> layers_;
    std::vector<typename Staging::point_type> points_;
};

}  // namespace varve::detail
