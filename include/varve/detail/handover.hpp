#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <utility>

#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/error.hpp"
#include "varve/observer.hpp"

namespace varve::detail {

/// What a save's end is with a relaying sink: hands it over, and keeps what the receiver answers for the committing thread,
/// so that observers take none of the sink's time, and what is told is told in order. The committing thread's, but for the
/// answers, which come on the sink's.
template <staging Staging, sink Sink>
class handover {
public:
    using line_type = save_line<Staging, Sink>;
    using job_type = typename line_type::job_type;

    explicit handover(line_type& line) : line_(line) {}

    /// From here on the save is the receiver's; its turn is over.
    void hand_over(job_type& job)
        requires relaying_sink<Sink>
    {
        job.snapshot = {};
        {
            std::lock_guard lock(line_.mutex);
            job.place = turn::handed;
        }
        std::span<std::uint64_t const> digests;
        if (line_.hashes) digests = job.chunk_digests;
        job.target->hand_over({job.step(), 0, std::move(job.metadata)}, digests, {&handover::came<&job_type::safe_came>, &job},
                              {&handover::came<&job_type::end_came>, &job});
    }

    /// Tells what has become of a save that was handed over; with none of it, it is cancelled. Returns its outcome, once it is over.
    std::optional<std::error_code> tell_news(job_type& job) {
        std::unique_lock lock(line_.mutex);
        bool const cancelled = !job.has_news();
        if (cancelled) {
            lock.unlock();
            job.target.reset();  // no answer comes after this
            lock.lock();
        }
        bool const safe = !job.safe_told && job.safe_came && !*job.safe_came;
        job.safe_told = job.safe_came.has_value();
        auto const end = job.end_came;
        lock.unlock();
        if (safe) {
            auto const bytes = line_.layout.size_bytes;
            line_.options.observers.on({.what = milestone::written, .step = job.step(), .bytes = bytes});
            job.ticket->reach(goal::written);
            line_.options.observers.on({.what = milestone::crash_safe, .step = job.step(), .bytes = bytes});
            job.ticket->reach(goal::crash_safe);
            lock.lock();
            job.safe = true;
            lock.unlock();
            line_.idle.notify_all();
        }
        if (!end && !cancelled) return {};
        job.target.reset();
        return end ? *end : make_error_code(errc::cancelled);
    }

private:
    template <auto Answer>
    static void came(void* context, std::error_code ec) noexcept {
        auto& job = *static_cast<job_type*>(context);
        auto& line = *job.line;
        std::lock_guard lock(line.mutex);
        job.*Answer = ec;
        // Woken under the lock: with the second answer the job is the committing thread's.
        line.commit_work.notify_one();
    }

    line_type& line_;
};

}  // namespace varve::detail
