#pragma once

#include <sys/mman.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stop_token>
#include <string>
#include <system_error>
#include <utility>

#include "varve/concepts/staging.hpp"
#include "varve/detail/block_pool.hpp"
#include "varve/detail/gather.hpp"
#include "varve/error.hpp"
#include "varve/image.hpp"

namespace varve {

/// A pool of buffers in ordinary host memory, filled by memcpy.
///
/// The pool is allocated, and its pages touched, once; it never grows. Its memory may come from somebody else, such as
/// a shared mapping.
class host_staging {
public:
    static constexpr memory_kind memory = memory_kind::host;

    /// A memcpy is ordered by having been done.
    struct order_type {};
    struct point_type {};
    struct token_type {
        std::error_code wait() const noexcept { return {}; }
    };
    using buffer_type = detail::block_pool::buffer;

    /// Allocates `pool_bytes`, rounded down to whole blocks but at least one. `block_bytes` is a multiple of
    /// block_unit_bytes. Throws error(std::errc::not_enough_memory).
    host_staging(std::size_t pool_bytes, std::size_t block_bytes) {
        auto size = std::max<std::size_t>(1, pool_bytes / block_bytes) * block_bytes;
        void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (memory == MAP_FAILED)
            throw error(std::make_error_code(std::errc::not_enough_memory),
                        "staging pool: no memory for " + std::to_string(size) + " bytes; give a smaller pool");
        std::shared_ptr<void> owner(memory, [size](void* p) { ::munmap(p, size); });
        pool_ = std::make_shared<detail::block_pool>(detail::regions_of({static_cast<std::byte*>(memory), size}, block_bytes), block_bytes,
                                                     std::move(owner));
    }

    /// Uses memory of the caller's, aligned to 4,096 bytes, which `owner` keeps, or which outlives the staging, all of its
    /// buffers and their loans. Throws error(std::errc::invalid_argument) for memory that is not aligned or holds no block.
    host_staging(std::span<std::byte> memory, std::size_t block_bytes, std::shared_ptr<void> owner = nullptr) {
        detail::expect_pool_memory(memory, block_bytes);
        pool_ = std::make_shared<detail::block_pool>(detail::regions_of(memory, block_bytes), block_bytes, std::move(owner));
    }

    std::size_t block_bytes() const noexcept { return pool_->block_bytes(); }
    std::size_t block_count() const noexcept { return pool_->count(); }
    std::span<std::span<std::byte> const> regions() const noexcept { return pool_->regions(); }

    /// Waits for a free buffer; returns an empty one when `stop` is requested. Thread-safe.
    buffer_type acquire(std::stop_token stop) { return detail::block_pool::acquire(pool_, stop); }

    point_type record(order_type) noexcept { return {}; }

    token_type copy(buffer_type& into, std::span<copy_range const> ranges, point_type const&) noexcept {
        for (auto const& r : ranges) detail::gather(*r.source, r.source_offset_bytes, r.size_bytes, into.data() + r.buffer_offset_bytes);
        return {};
    }

    std::error_code order_after(token_type const&, order_type) noexcept { return {}; }

private:
    std::shared_ptr<detail::block_pool> pool_;
};

static_assert(staging<host_staging> && lending_staging<host_staging>);

}  // namespace varve
