#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <semaphore>
#include <stop_token>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/detail/block_writer.hpp"
#include "varve/detail/handover.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/error.hpp"
#include "varve/observer.hpp"
#include "varve/store.hpp"

namespace varve::detail {

/// Where a save goes out: takes it once its last block is written, hands the turn on, writes the header, syncs and commits,
/// in step order; with a relaying sink it hands the save over instead. One thread's, the committing thread's, which is also
/// the one that tells what has become of a save.
template <staging Staging, sink Sink, fixed_layout_format Format>
class committer {
public:
    using line_type = save_line<Staging, Sink>;
    using job_type = typename line_type::job_type;
    using job_ptr = typename line_type::job_ptr;

    committer(line_type& line, block_writer<Staging, Sink>& writer, Format const& format, store* files)
        : line_(line), writer_(writer), format_(format), files_(files), handover_(line) {}

    /// Brings saves in until it is to stop.
    void run(std::stop_token stop) {
        std::unique_lock lock(line_.mutex);
        for (;;) {
            job_ptr job;
            if (!line_.commit_work.wait(lock, stop, [&] { return (job = next()) != nullptr; })) return;
            bool const handed = job->place == turn::handed, lost = static_cast<bool>(job->error);
            job->committing = true;
            if (job->place == turn::writing) --line_.writing;
            lock.unlock();
            if (!handed) {
                // The next one's blocks are on their way while this one's header and its commit are waited for.
                writer_.hand_on_turns();
                bring_in(job, lost);
            } else if (auto outcome = handover_.tell_news(*job)) {
                conclude(job, *outcome);
            }
            lock.lock();
        }
    }

private:
    /// Lost saves leave at once, whole ones in their order. With the mutex held.
    job_ptr next() const {
        bool first = true;
        for (auto const& j : line_.jobs) {
            if (j->place == turn::handed) {
                if (j->has_news() || line_.cancelling) return j;
                continue;
            }
            if (j->over() && (j->error || (first && j->place == turn::writing))) return j;
            first = false;
        }
        return nullptr;
    }

    /// A relaying sink answers for what it loses from here on.
    void bring_in(job_ptr const& job, [[maybe_unused]] bool lost) {
        if constexpr (relaying_sink<Sink>) {
            if (!lost) return handover_.hand_over(*job);
        }
        conclude(job, finish(*job));
    }

    /// Makes a whole save durable and lets a lost one's file go; returns its outcome.
    std::error_code finish(job_type& job) {
        std::error_code outcome = job.error;
        bool synced = true;
        if (!outcome) outcome = write_header(job);
        if (!outcome) {
            line_.options.observers.on({.what = milestone::written, .step = job.step(), .bytes = line_.layout.size_bytes});
            job.ticket->reach(goal::written);
            outcome = job.target->sync();
            synced = !outcome;
        }
        job.target.reset();
        job.snapshot = {};
        if (job.file) {
            try {
                if (outcome)
                    files_->give_back(std::move(*job.file), outcome, synced);
                else
                    outcome = files_->commit(std::move(*job.file), job.step(), sequence_);
            } catch (std::exception const&) {
                if (!outcome) outcome = std::make_error_code(std::errc::not_enough_memory);
            }
        }
        if (!outcome) job.ticket->reach(goal::crash_safe);
        return outcome;
    }

    std::error_code write_header(job_type& job) {
        try {
            sequence_ = files_ ? files_->next_sequence() : sequence_ + 1;
            auto bytes = format_.header(line_.state, line_.layout, {job.step(), sequence_, job.metadata}, job.chunk_digests);
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

    /// The save ends with that outcome, and is forgotten.
    void conclude(job_ptr const& job, std::error_code outcome) {
        auto what = !outcome ? milestone::durable : outcome == errc::replaced ? milestone::replaced : milestone::failed;
        line_.options.observers.on({.what = what, .step = job->step(), .bytes = outcome ? 0 : line_.layout.size_bytes, .error = outcome});
        if (outcome)
            job->ticket->fail(outcome);
        else
            job->ticket->reach(goal::durable);
        {
            std::lock_guard lock(line_.mutex);
            std::erase(line_.jobs, job);
            // No copy for a checkpoint is on its way then, and no update need wait.
            if (!outcome && job.get() == line_.newest)
                for (auto& l : line_.layers) l.copies.clear();
            else if (!job->by_snapshot)
                line_.forget_copies(*job);
        }
        line_.wake_all();
    }

    line_type& line_;
    block_writer<Staging, Sink>& writer_;
    Format const& format_;
    store* const files_;
    handover<Staging, Sink> handover_;
    std::uint64_t sequence_ = 0;
};

}  // namespace varve::detail
