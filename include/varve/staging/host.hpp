#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <stop_token>
#include <sys/mman.h>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/detail/gather.hpp"
#include "varve/error.hpp"
#include "varve/image.hpp"

namespace varve {

/// A pool of buffers in ordinary host memory, filled by memcpy.
///
/// The pool is allocated, and its pages touched, once; it never grows. Its memory may come from somebody else, such as
/// a shared mapping.
class host_staging {
    struct pool;

public:
    static constexpr memory_kind memory = memory_kind::host;

    /// A memcpy is ordered by having been done.
    struct order_type {};
    struct point_type {};
    struct token_type {
        std::error_code wait() const noexcept { return {}; }
    };

    /// One block of the pool; gives itself back.
    class buffer_type {
    public:
        buffer_type() noexcept = default;
        buffer_type(buffer_type&& other) noexcept : pool_(std::move(other.pool_)), index_(other.index_) {}
        buffer_type& operator=(buffer_type&& other) noexcept {
            if (this != &other) {
                reset();
                pool_ = std::move(other.pool_);
                index_ = other.index_;
            }
            return *this;
        }
        ~buffer_type() { reset(); }

        explicit operator bool() const noexcept { return pool_ != nullptr; }
        std::byte* data() const noexcept { return pool_->address(index_); }
        std::size_t region() const noexcept { return index_ / pool_->blocks_per_region; }

    private:
        friend class host_staging;
        buffer_type(std::shared_ptr<pool> p, std::size_t index) noexcept : pool_(std::move(p)), index_(index) {}
        void reset() noexcept {
            if (pool_) pool_->give_back(index_);
            pool_.reset();
        }

        std::shared_ptr<pool> pool_;
        std::size_t index_ = 0;
    };

    /// Allocates `pool_bytes`, rounded down to whole blocks but at least one. `block_bytes` is a multiple of
    /// block_unit_bytes. Throws error(std::errc::not_enough_memory).
    host_staging(std::size_t pool_bytes, std::size_t block_bytes) : pool_(std::make_shared<pool>()) {
        auto count = std::max<std::size_t>(1, pool_bytes / block_bytes);
        auto size = count * block_bytes;
        void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (memory == MAP_FAILED)
            throw error(std::make_error_code(std::errc::not_enough_memory),
                        "staging pool: no memory for " + std::to_string(size) + " bytes; give a smaller pool");
        pool_->owned = {static_cast<std::byte*>(memory), size};
        pool_->divide(pool_->owned, block_bytes);
    }

    /// Uses memory of the caller's, aligned to 4,096 bytes, which outlives the staging and all of its buffers.
    host_staging(std::span<std::byte> memory, std::size_t block_bytes) : pool_(std::make_shared<pool>()) {
        if (memory.size() < block_bytes || reinterpret_cast<std::uintptr_t>(memory.data()) % 4096 != 0)
            throw error(std::make_error_code(std::errc::invalid_argument), "staging pool: memory must be aligned to 4096 and hold at least one block");
        pool_->divide(memory, block_bytes);
    }

    std::size_t block_bytes() const noexcept { return pool_->block_bytes; }
    std::size_t block_count() const noexcept { return pool_->count; }
    std::span<std::span<std::byte> const> regions() const noexcept { return pool_->regions; }

    /// Waits for a free buffer; returns an empty one when `stop` is requested. Thread-safe.
    buffer_type acquire(std::stop_token stop) {
        std::unique_lock lock(pool_->mutex);
        if (!pool_->freed.wait(lock, stop, [&] { return !pool_->free.empty(); })) return {};
        auto index = pool_->free.back();
        pool_->free.pop_back();
        return {pool_, index};
    }

    point_type record(order_type) noexcept { return {}; }

    token_type copy(buffer_type& into, std::span<copy_range const> ranges, point_type const&) noexcept {
        for (auto const& r : ranges)
            detail::gather(*r.source, r.source_offset_bytes, r.size_bytes, into.data() + r.buffer_offset_bytes);
        return {};
    }

    std::error_code order_after(token_type const&, order_type) noexcept { return {}; }

private:
    struct pool {
        std::mutex mutex;
        std::condition_variable_any freed;
        std::vector<std::size_t> free;
        std::vector<std::span<std::byte>> regions;
        std::span<std::byte> all;
        std::span<std::byte> owned;
        std::size_t block_bytes = 0;
        std::size_t count = 0;
        std::size_t blocks_per_region = 1;

        ~pool() {
            if (!owned.empty()) ::munmap(owned.data(), owned.size());
        }

        /// A region is at most 1 GiB, the most that a ring registers as one buffer.
        void divide(std::span<std::byte> memory, std::size_t bytes) {
            constexpr std::size_t largest_region_bytes = std::size_t{1} << 30;
            all = memory;
            block_bytes = bytes;
            count = memory.size() / bytes;
            blocks_per_region = std::max<std::size_t>(1, largest_region_bytes / bytes);
            for (std::size_t first = 0; first < count; first += blocks_per_region)
                regions.push_back(memory.subspan(first * bytes, std::min(blocks_per_region, count - first) * bytes));
            free.reserve(count);
            for (std::size_t i = count; i-- > 0;) free.push_back(i);
        }

        std::byte* address(std::size_t index) const noexcept { return all.data() + index * block_bytes; }

        void give_back(std::size_t index) noexcept {
            {
                std::lock_guard lock(mutex);
                free.push_back(index);
            }
            freed.notify_one();
        }
    };

    std::shared_ptr<pool> pool_;
};

static_assert(staging<host_staging>);

}  // namespace varve
