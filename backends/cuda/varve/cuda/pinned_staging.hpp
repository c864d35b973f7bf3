#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stop_token>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/cuda/detail/stream_staging.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/cuda/stream_order.hpp"
#include "varve/cuda/transfer.hpp"
#include "varve/detail/block_pool.hpp"
#include "varve/detail/gather.hpp"
#include "varve/error.hpp"

namespace varve::cuda {

struct pinned_staging_options {
    std::size_t snapshots = 0;    ///< saves that may be put aside in GPU memory at once; 0: none
    double snapshot_share = 0.5;  ///< of the GPU memory that is free at the start, at most
    int numa_node = -1;           ///< whose memory the pool takes, numa_node_of(device) say; negative: any
    bool measure_waits = false;   ///< gpu_wait_ns() says how long updates waited in their streams (see wait_meter)
};

/// A pool of buffers in page-locked host memory, filled from GPU memory by copies on streams of its own.
///
/// A copy follows the work that the recorded point stands for, and an update follows the copy, through events: nothing
/// waits for a whole device, and the training thread waits until copies are issued, not until they are done. Tensors may lie on several devices and
/// in host memory; those that say memory_kind::host have been written by the CPU when their layer is announced, those that say pinned may be written
/// by the stream. A stream that is being captured cannot be copied from: the save ends with errc::unsupported. With snapshots it satisfies
/// snapshot_digesting_staging: the CPU touches no byte of a save. Source: CUDA Runtime API, "Stream Management", "Event Management".
///
///     varve::cuda::pinned_staging staging(8 * block_bytes, block_bytes, {.snapshots = 2});
class pinned_staging : public detail::stream_staging {
public:
    static constexpr memory_kind memory = memory_kind::pinned;

    /// Allocates `pool_bytes`, rounded down to whole blocks but at least one, in regions of at most 1 GiB; every GPU may
    /// copy there. `block_bytes` is a multiple of block_unit_bytes. Throws error with the code of CUDA: equal to
    /// std::errc::not_enough_memory where no more can be page-locked, or the current device has no room for a stream.
    pinned_staging(std::size_t pool_bytes, std::size_t block_bytes, pinned_staging_options options = {})
        : stream_staging(allocate(pool_bytes, block_bytes, options.numa_node), false, options.snapshots, options.snapshot_share,
                         options.measure_waits) {}

    /// Page-locks memory of the caller's, aligned to 4,096 bytes, which `owner` keeps, such as another process's too
    /// (varve::asio::shared_pool); regions are registered one by one. Throws as above.
    pinned_staging(std::span<std::byte> memory, std::size_t block_bytes, std::shared_ptr<void> owner, pinned_staging_options options = {})
        : stream_staging(lock(memory, block_bytes, std::move(owner)), false, options.snapshots, options.snapshot_share, options.measure_waits) {}

    using stream_staging::copy;
    token_type copy(buffer_type& into, std::span<copy_range const> ranges, point_type const& after) noexcept {
        if (after.failed()) return after;
        relaxed_capture relaxed;
        issued_copies issued(*this, after);
        std::error_code failed;
        bool waited = false;
        for (auto const& r : ranges) {
            auto* to = into.data() + r.buffer_offset_bytes;
            if (r.source->memory == memory_kind::device) {
                failed = issued.add(r, to);
            } else {
                // Nothing but the CPU writes to ordinary memory: what is announced is there. A stream may write to page-locked memory.
                if (r.source->memory == memory_kind::pinned && !std::exchange(waited, true)) failed = after.wait();
                if (!failed) varve::detail::gather(*r.source, r.source_offset_bytes, r.size_bytes, to);
            }
            if (failed) break;
        }
        return issued.finish(failed);
    }

    /// The way to tensors on the calling thread's device, once the work in `order` is done; through the blocks of the pool that
    /// are free, since page-locking more would take longer than the way. Throws error.
    std::unique_ptr<device_memory> reach(order_type order) {
        device_scope on(order.device);
        std::stop_source at_once;
        at_once.request_stop();
        auto blocks = std::make_shared<std::vector<buffer_type>>();
        std::vector<std::span<std::byte>> memory;
        for (std::size_t bytes = 0; block_bytes() >= device_memory::piece_bytes && bytes < most_reach_bytes; bytes += block_bytes()) {
            auto block = acquire(at_once.get_token());
            if (!block) break;
            memory.emplace_back(block.data(), block_bytes());
            blocks->push_back(std::move(block));
        }
        return std::make_unique<transfer>(order.stream, memory, std::move(blocks));
    }

    /// One line: the pool, the snapshots and what GPU memory they take, or why there are none.
    std::string describe() const {
        return "page-locked memory, " + std::to_string(block_count()) + " blocks of " + std::to_string(block_bytes() >> 20) + " MiB" +
               describe_snapshots();
    }

private:
    static constexpr std::size_t most_reach_bytes = 256u << 20;

    static std::shared_ptr<varve::detail::block_pool> allocate(std::size_t pool_bytes, std::size_t block_bytes, int numa_node) {
        auto const count = std::max<std::size_t>(1, pool_bytes / block_bytes);
        auto const most = varve::detail::block_pool::blocks_per_region(block_bytes);
        auto memory = std::make_shared<std::vector<page_locked>>();
        std::vector<std::span<std::byte>> regions;
        try {
            for (std::size_t first = 0; first < count; first += most) {
                memory->emplace_back(std::min(most, count - first) * block_bytes, numa_node);
                regions.push_back(memory->back().bytes());
            }
        } catch (error const& e) {
            throw error(e.code(), "staging pool of " + std::to_string(count * block_bytes) + " bytes: " + e.what() +
                                      (e.code() == std::errc::invalid_argument ? "; give a node that has memory" : "; give a smaller pool"));
        }
        return std::make_shared<varve::detail::block_pool>(std::move(regions), block_bytes, std::move(memory));
    }

    static std::shared_ptr<varve::detail::block_pool> lock(std::span<std::byte> memory, std::size_t block_bytes, std::shared_ptr<void> owner) {
        varve::detail::expect_pool_memory(memory, block_bytes);
        struct kept {
            std::shared_ptr<void> owner;
            std::vector<page_lock> locks;
        };
        auto keeps = std::make_shared<kept>();
        keeps->owner = std::move(owner);
        auto regions = varve::detail::regions_of(memory, block_bytes);
        try {
            for (auto region : regions) keeps->locks.emplace_back(region);
        } catch (error const& e) {
            throw error(e.code(), "staging pool of " + std::to_string(memory.size()) + " bytes: " + e.what() + "; give a smaller pool");
        }
        return std::make_shared<varve::detail::block_pool>(std::move(regions), block_bytes, std::move(keeps));
    }
};

static_assert(lending_staging<pinned_staging>);
static_assert(snapshot_digesting_staging<pinned_staging> && reaching_staging<pinned_staging> && wait_measuring_staging<pinned_staging>);

}  // namespace varve::cuda
