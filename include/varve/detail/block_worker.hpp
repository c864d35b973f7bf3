#pragma once

#include <cstddef>
#include <mutex>
#include <span>
#include <stop_token>
#include <system_error>
#include <utility>

#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/block_writer.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/save_line.hpp"
#include "varve/observer.hpp"

namespace varve::detail {

/// What the workers do with a block that the copier queued: waits for its copies, has it written if it is the save's turn, and
/// hashes it meanwhile. Several threads run it, each with a block of its own.
template <staging Staging, sink Sink>
class block_worker {
public:
    using line_type = save_line<Staging, Sink>;
    using job_ptr = typename line_type::job_ptr;
    using block_type = typename line_type::block_type;

    block_worker(line_type& line, Staging& staging, block_writer<Staging, Sink>& writer) : line_(line), staging_(staging), writer_(writer) {}

    /// Takes blocks until it is to stop.
    void run(std::stop_token stop) {
        std::unique_lock lock(line_.mutex);
        for (;;) {
            if (!line_.staged_work.wait(lock, stop, [&] { return line_.has_staged(); })) return;
            auto [job, index] = std::move(line_.staged.front());
            line_.staged.pop_front();
            if (job->hashed_aside) line_.one_waits = true;
            if (line_.has_staged()) line_.staged_work.notify_one();
            lock.unlock();
            finish_staging(job, index);
            job.reset();
            lock.lock();
        }
    }

private:
    void finish_staging(job_ptr const& job, std::size_t index) {
        auto& block = job->blocks[index];
        std::error_code failed;
        for (auto const& token : block.copies)
            if (auto ec = token.wait()) failed = ec;
        if (failed) line_.fail(*job, failed);
        bool all_staged = false, write_now = false, lost = false;
        {
            [[maybe_unused]] typename line_type::snapshot_type free;
            std::lock_guard lock(line_.mutex);
            if (job->hashed_aside) {
                line_.one_waits = false;
                if (line_.has_staged()) line_.staged_work.notify_one();
            }
            if (!failed) line_.forget_taken(*job, block);
            all_staged = ++job->blocks_staged == line_.blocks() && !job->error;
            if (all_staged) free = std::exchange(job->snapshot, {});
            lost = static_cast<bool>(job->error);
            write_now = job->place == turn::writing;
            if (!lost && !write_now) job->held.push_back(index);
        }
        if (all_staged) {
            line_.options.observers.on({.what = milestone::staged, .step = job->step(), .bytes = line_.layout.size_bytes});
            job->ticket->reach(goal::staged);
        }
        if (lost) {
            line_.end_of(block);
        } else if (write_now) {
            writer_.write(block);
        }
        hash(block);
        line_.end_of(block);
    }

    void hash(block_type& block) {
        if (!line_.hashes || block.job->hashed_aside) return;
        auto const& plan = line_.map.blocks()[block.index];
        auto first = (plan.offset_bytes - line_.layout.header_bytes) / digest_chunk_bytes;
        auto out = std::span(block.job->chunk_digests).subspan(first);
        if constexpr (digesting_staging<Staging>) {
            if (auto ec = staging_.digest(block.buffer, plan.size_bytes, out)) line_.fail(*block.job, ec);
        } else {
            chunk_digests({block.buffer.data(), plan.size_bytes}, out);
        }
    }

    line_type& line_;
    [[maybe_unused]] Staging& staging_;
    block_writer<Staging, Sink>& writer_;
};

}  // namespace varve::detail
