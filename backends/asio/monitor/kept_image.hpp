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
};

}  // namespace varve::asio::server
