#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <stop_token>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/error.hpp"
#include "varve/loan.hpp"

namespace varve::detail {

/// What a staging's blocks are cut from, and which of them are free. Thread-safe.
class block_pool {
public:
    /// A region is at most 1 GiB, the most that a ring registers as one buffer.
    static constexpr std::size_t largest_region_bytes = std::size_t{1} << 30;

    /// How many blocks a region holds.
    static constexpr std::size_t blocks_per_region(std::size_t block_bytes) noexcept {
        return std::max<std::size_t>(1, largest_region_bytes / block_bytes);
    }

    /// `regions` hold whole blocks, each but the last blocks_per_region() of them; `owner` keeps them alive.
    block_pool(std::vector<std::span<std::byte>> regions, std::size_t block_bytes, std::shared_ptr<void> owner)
        : owner_(std::move(owner)), regions_(std::move(regions)), block_bytes_(block_bytes) {
        for (auto r : regions_) count_ += r.size() / block_bytes_;
        free_.reserve(count_);
        holders_.resize(count_);
        for (std::size_t i = count_; i-- > 0;) free_.push_back(i);
    }

    std::size_t block_bytes() const noexcept { return block_bytes_; }
    std::size_t count() const noexcept { return count_; }
    std::span<std::span<std::byte> const> regions() const noexcept { return regions_; }
    std::size_t region_of(std::size_t index) const noexcept { return index / blocks_per_region(block_bytes_); }
    std::byte* address(std::size_t index) const noexcept {
        return regions_[region_of(index)].data() + index % blocks_per_region(block_bytes_) * block_bytes_;
    }

    /// One block; gives itself back.
    class buffer {
    public:
        buffer() noexcept = default;
        buffer(std::shared_ptr<block_pool> pool, std::size_t index) noexcept : pool_(std::move(pool)), index_(index) {}
        buffer(buffer&& other) noexcept : pool_(std::move(other.pool_)), index_(other.index_) {}
        buffer& operator=(buffer&& other) noexcept {
            if (this != &other) {
                reset();
                pool_ = std::move(other.pool_);
                index_ = other.index_;
            }
            return *this;
        }
        ~buffer() { reset(); }

        explicit operator bool() const noexcept { return pool_ != nullptr; }
        std::byte* data() const noexcept { return pool_->address(index_); }
        std::size_t region() const noexcept { return pool_->region_of(index_); }
        /// Keeps the block's bytes beyond this buffer.
        loan lend() const noexcept {
            pool_->hold(index_);
            return {pool_, index_, [](void* pool, std::size_t index) noexcept { static_cast<block_pool*>(pool)->give_back(index); }};
        }

    private:
        void reset() noexcept {
            if (pool_) pool_->give_back(index_);
            pool_.reset();
        }

        std::shared_ptr<block_pool> pool_;
        std::size_t index_ = 0;
    };

    /// Waits for a free block; an empty buffer when `stop` is requested.
    static buffer acquire(std::shared_ptr<block_pool> const& pool, std::stop_token stop) {
        std::unique_lock lock(pool->mutex_);
        if (!pool->freed_.wait(lock, stop, [&] { return !pool->free_.empty(); })) return {};
        auto index = pool->free_.back();
        pool->free_.pop_back();
        pool->holders_[index] = 1;
        return {pool, index};
    }

private:
    void hold(std::size_t index) noexcept {
        std::lock_guard lock(mutex_);
        ++holders_[index];
    }
    void give_back(std::size_t index) noexcept {
        {
            std::lock_guard lock(mutex_);
            if (--holders_[index] > 0) return;
            free_.push_back(index);
        }
        freed_.notify_one();
    }

    std::shared_ptr<void> owner_;
    std::vector<std::span<std::byte>> regions_;
    std::size_t block_bytes_;
    std::size_t count_ = 0;
    std::mutex mutex_;
    std::condition_variable_any freed_;
    std::vector<std::size_t> free_;
    std::vector<std::uint32_t> holders_;  ///< of each block: its buffer and its loans
};

/// That a staging's pool can lie in memory which was given to it. Throws std::errc::invalid_argument.
inline void expect_pool_memory(std::span<std::byte> memory, std::size_t block_bytes) {
    if (memory.size() < block_bytes || reinterpret_cast<std::uintptr_t>(memory.data()) % 4096 != 0)
        throw error(std::make_error_code(std::errc::invalid_argument), "staging pool: memory must be aligned to 4096 and hold at least one block");
}

/// The blocks of one stretch of memory as regions.
inline std::vector<std::span<std::byte>> regions_of(std::span<std::byte> memory, std::size_t block_bytes) {
    std::vector<std::span<std::byte>> regions;
    auto const count = memory.size() / block_bytes, most = block_pool::blocks_per_region(block_bytes);
    for (std::size_t first = 0; first < count; first += most)
        regions.push_back(memory.subspan(first * block_bytes, std::min(most, count - first) * block_bytes));
    return regions;
}

}  // namespace varve::detail
