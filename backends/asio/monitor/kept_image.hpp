#pragma once

#include <cstdint>

#include "varve/system.hpp"

#include "memory_budget.hpp"

namespace varve::asio::server {

/// A checkpoint in memory, byte for byte the file that it is or would be.
struct kept_image {
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    std::uint64_t size_bytes = 0;
    bool durable = false;  ///< it is on disk too
    file_descriptor memory;
    memory_budget::lease lease;

    /// Whether that of a checkpoint on disk is of one that was saved later, without the monitor.
    bool is_older_than(std::uint64_t sequence_on_disk) const noexcept {
        return sequence_on_disk > sequence || (sequence_on_disk == sequence && !durable);
    }
};

}  // namespace varve::asio::server
