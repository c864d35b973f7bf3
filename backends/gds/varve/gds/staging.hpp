#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/cuda/detail/stream_staging.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/block_pool.hpp"
#include "varve/error.hpp"
#include "varve/gds/detail/digests.hpp"
#include "varve/gds/detail/uploads.hpp"

namespace varve::gds {

struct staging_options {
    std::size_t snapshots = 0;    ///< saves that may be put aside in GPU memory at once, beside the pool; 0: none
    double snapshot_share = 0.5;  ///< of the GPU memory that is free at the start, at most
    bool measure_waits = false;   ///< gpu_wait_ns() says how long updates waited in their streams (see wait_meter)
};

/// A pool of buffers in the memory of the GPU that the calling thread is on, filled by copies on streams of its own, for a
/// sink that takes GPU memory. Digests are computed on the GPU.
///
/// Order, tensors, stream capture and snapshots are as with cuda::pinned_staging; tensors in host memory come up through a
/// few page-locked pieces. Source: CUDA Runtime API, "Stream Management", "Event Management"; cuFile API Reference.
///
///     varve::gds::staging staging(8 * block_bytes, block_bytes);
class staging : public cuda::detail::stream_staging {
public:
    static constexpr memory_kind memory = memory_kind::device;

    /// Allocates `pool_bytes`, rounded down to whole blocks but at least one, in regions of at most 1 GiB. `block_bytes` is a
    /// multiple of block_unit_bytes. Throws error with the code of CUDA: equal to std::errc::not_enough_memory where the GPU
    /// has no more.
    staging(std::size_t pool_bytes, std::size_t block_bytes, staging_options options = {})
        : stream_staging(allocate(pool_bytes, block_bytes), true, options.snapshots, options.snapshot_share, options.measure_waits),
          own_(std::make_shared<own>(block_bytes)) {}

    /// The same in memory of somebody else's on that GPU, such as what is shared with a monitor: aligned to 4,096 bytes and as
    /// large as a block at least; `owner` keeps it. Throws error.
    staging(std::span<std::byte> memory, std::size_t block_bytes, std::shared_ptr<void> owner, staging_options options = {})
        : stream_staging(cut(memory, block_bytes, std::move(owner)), true, options.snapshots, options.snapshot_share, options.measure_waits),
          own_(std::make_shared<own>(block_bytes)) {}

    using stream_staging::copy;
    token_type copy(buffer_type& into, std::span<copy_range const> ranges, point_type const& after) noexcept {
        if (after.failed()) return after;
        cuda::relaxed_capture relaxed;
        issued_copies issued(*this, after);
        std::error_code failed;
        {
            cuda::device_scope on(own_->device);
            detail::uploads::batch from_host(own_->up);
            bool waited = false;
            for (auto const& r : ranges) {
                if (r.source->memory == memory_kind::device) continue;
                // Nothing but the CPU writes to ordinary memory: what is announced is there. A stream may write to page-locked memory.
                if (r.source->memory == memory_kind::pinned && !std::exchange(waited, true)) failed = after.wait();
                if (!failed) failed = from_host.add(r, into.data() + r.buffer_offset_bytes);
                if (failed) break;
            }
            issued.join(from_host.finish(failed));
        }
        for (auto const& r : ranges) {
            if (failed) break;
            if (r.source->memory == memory_kind::device) failed = issued.add(r, into.data() + r.buffer_offset_bytes);
        }
        return issued.finish(failed);
    }

    using stream_staging::digest;
    /// See digesting_staging: one kernel, a chunk a block of threads.
    std::error_code digest(buffer_type const& buffer, std::size_t size_bytes, std::span<std::uint64_t> out) noexcept {
        cuda::relaxed_capture relaxed;
        cuda::device_scope on(own_->device);
        return own_->hashes.hash(buffer.data(), size_bytes, out);
    }

    /// GPU memory that the pool takes.
    std::uint64_t pool_bytes() const noexcept { return std::uint64_t{block_bytes()} * block_count(); }
    /// That the snapshots and the pool take.
    std::uint64_t gpu_bytes() const noexcept { return pool_bytes() + snapshot_bytes(); }

    /// One line: the pool, the snapshots and what GPU memory they take, or why there are none.
    std::string describe() const {
        return "memory of GPU " + std::to_string(own_->device) + ", " + std::to_string(block_count()) + " blocks of " +
               std::to_string(block_bytes() >> 20) + " MiB" + describe_snapshots();
    }

private:
    /// What belongs to the pool's device.
    struct own {
        explicit own(std::size_t block_bytes) : device(current_device()), hashes(block_bytes, events), up(events) {}

        int const device;
        std::shared_ptr<cuda::event_pool> events = std::make_shared<cuda::event_pool>();
        detail::digests hashes;
        detail::uploads up;
    };

    static int current_device() {
        int device = 0;
        cuda::throw_if(::cudaGetDevice(&device), "the current device");
        return device;
    }

    static std::shared_ptr<varve::detail::block_pool> allocate(std::size_t pool_bytes, std::size_t block_bytes) {
        cuda::relaxed_capture relaxed;
        auto const count = std::max<std::size_t>(1, pool_bytes / block_bytes);
        auto const most = varve::detail::block_pool::blocks_per_region(block_bytes);
        auto memory = std::make_shared<std::vector<cuda::device_bytes>>();
        std::vector<std::span<std::byte>> regions;
        try {
            for (std::size_t first = 0; first < count; first += most) {
                memory->emplace_back(std::min(most, count - first) * block_bytes);
                regions.push_back(memory->back().bytes());
            }
        } catch (error const& e) {
            throw error(e.code(), "staging pool of " + std::to_string(count * block_bytes) + " bytes: " + e.what() + "; give a smaller pool");
        }
        return std::make_shared<varve::detail::block_pool>(std::move(regions), block_bytes, std::move(memory));
    }

    static std::shared_ptr<varve::detail::block_pool> cut(std::span<std::byte> memory, std::size_t block_bytes, std::shared_ptr<void> owner) {
        varve::detail::expect_pool_memory(memory, block_bytes);
        return std::make_shared<varve::detail::block_pool>(varve::detail::regions_of(memory, block_bytes), block_bytes, std::move(owner));
    }

    std::shared_ptr<own> own_;
};

static_assert(varve::staging<staging> && digesting_staging<staging> && snapshot_digesting_staging<staging> && reaching_staging<staging>);

}  // namespace varve::gds
