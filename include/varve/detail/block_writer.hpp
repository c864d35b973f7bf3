#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/error.hpp"
#include "varve/observer.hpp"
#include "varve/store.hpp"

namespace varve::detail {

/// From buffers to the sink: opens the targets of the saves whose turn it is, and submits their blocks. The workers, the
/// copying and the committing thread call it, whichever finds first that a turn is free; the sink's thread says when a write
/// is done.
template <staging Staging, sink Sink>
class block_writer {
public:
    using line_type = save_line<Staging, Sink>;
    using job_ptr = typename line_type::job_ptr;
    using block_type = typename line_type::block_type;

    block_writer(line_type& line, Staging& staging, Sink& sink, store* files) : line_(line), sink_(sink), files_(files) {
        for (auto region : staging.regions()) {
            if constexpr (registering_sink<Sink>)
                slots_.push_back(sink_.register_memory(region));
            else
                slots_.push_back(unregistered);
        }
    }

    block_writer(block_writer const&) = delete;
    block_writer& operator=(block_writer const&) = delete;

    /// Opens targets for the saves whose turn it is, oldest first, and submits what they hold.
    void hand_on_turns() {
        while (auto const job = open_next()) {
            std::vector<std::size_t> held;
            bool lost = false;
            {
                std::lock_guard lock(line_.mutex);
                lost = static_cast<bool>(job->error);
                job->place = turn::writing;
                held.swap(job->held);
            }
            for (auto b : held) lost ? line_.end_of(job->blocks[b]) : write(job->blocks[b]);
            line_.wake_all();
        }
    }

    /// Submits a block of a save whose turn it is. Its end may have come when this returns.
    void write(block_type& block) {
        auto const& plan = line_.map.blocks()[block.index];
        line_.options.observers.on({.what = milestone::write, .step = block.job->step(), .bytes = plan.size_bytes});
        block_of_sink bytes{block.buffer.data(), plan.size_bytes, Staging::memory, slots_[block.buffer.region()]};
        completion const done{&block_writer::written, &block};
        if constexpr (relaying_sink<Sink> && lending_staging<Staging>)
            block.job->target->write(plan.offset_bytes, bytes, done, block.buffer.lend());
        else
            block.job->target->write(plan.offset_bytes, bytes, done);
    }

private:
    /// The oldest save whose turn has come, its target open, or its error set; null where none's has.
    job_ptr open_next() {
        // A receiver takes saves in the order in which they are opened, by whichever thread.
        std::unique_lock in_order(opening_, std::defer_lock);
        if constexpr (relaying_sink<Sink>) {
            {
                std::lock_guard lock(line_.mutex);
                if (!next_locked()) return nullptr;
            }
            in_order.lock();
        }
        job_ptr job;
        {
            std::lock_guard lock(line_.mutex);
            job = next_locked();
            if (!job) return nullptr;
            job->place = turn::opening;
            ++line_.writing;
        }
        std::error_code failed;
        try {
            if (files_) {
                job->file = files_->acquire();
                job->target.emplace(sink_.open({files_->folder(), job->file->name, line_.layout.size_bytes, job->step()}));
            } else {
                job->target.emplace(sink_.open({-1, {}, line_.layout.size_bytes, job->step(), {&block_writer::lost, job.get()}}));
            }
        } catch (error const& e) {
            failed = e.code();
        } catch (std::exception const&) {
            failed = std::make_error_code(std::errc::not_enough_memory);
        }
        if (failed) {
            std::lock_guard lock(line_.mutex);
            line_.set_error(*job, failed);
        }
        return job;
    }
    job_ptr next_locked() const {
        if (line_.writing >= line_.most_writing()) return nullptr;
        auto it = std::find_if(line_.jobs.begin(), line_.jobs.end(), [](auto const& j) { return j->place == turn::waiting && !j->error; });
        return it == line_.jobs.end() ? nullptr : *it;
    }

    using block_of_sink = varve::block;

    /// Its target is there as long as this runs, and the job with it.
    static void lost(void* context, std::error_code ec) noexcept {
        auto& job = *static_cast<typename line_type::job_type*>(context);
        job.line->fail(job, ec);
    }

    static void written(void* context, std::error_code ec) noexcept {
        auto& block = *static_cast<block_type*>(context);
        auto& line = *block.job->line;
        if (ec) line.fail(*block.job, ec);
        line.end_of(block);
    }

    line_type& line_;
    Sink& sink_;
    store* const files_;
    std::mutex opening_;      ///< of a relaying sink's targets
    std::vector<int> slots_;  ///< of the staging's regions, as the sink registered them
};

}  // namespace varve::detail
