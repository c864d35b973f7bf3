#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "varve/observer.hpp"

namespace varve {

/// What begin() does when as many saves as allowed are in flight.
enum class when_busy {
    block,   ///< waits until one is done
    skip,    ///< does not take this one; its ticket says errc::skipped
    replace  ///< the newest that waits staged and has not begun to write gives way; if none does, skip
};

struct checkpointer_options {
    when_busy busy = when_busy::block;
    std::size_t writing_at_once = 1;  ///< W: saves that write at the same time, oldest first
    /// How much of one save may be between the tensors and the sink at once, in bytes; rounded up to one block.
    std::uint64_t batch_bytes = std::numeric_limits<std::uint64_t>::max();
    unsigned digest_workers = 1;                         ///< threads that hash staged blocks
    std::chrono::milliseconds drain_on_destroy{60'000};  ///< then the destructor cancels what has not begun to write
    observer_list observers{};
};

/// Time that the training thread spent inside a checkpointer, in nanoseconds, since it was made.
struct stall_times {
    std::int64_t total_ns = 0;     ///< all of it: waiting, copying, issuing
    std::int64_t wait_ns = 0;      ///< the part that was waiting
    std::int64_t gpu_wait_ns = 0;  ///< GPU time in waits that were put into a stream; beside the total, not in it
};

}  // namespace varve
