#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

namespace varve::asio::server {

/// Bytes that may be held, and how many are. Thread-safe.
class memory_budget {
    struct count {
        std::uint64_t const limit;
        mutable std::mutex mutex{};
        std::uint64_t used = 0;
    };

public:
    explicit memory_budget(std::uint64_t limit_bytes) : count_(std::make_shared<count>(limit_bytes)) {}

    /// Bytes taken from the budget and given back with it. Move-only.
    class lease {
    public:
        lease() noexcept = default;
        lease(lease&& other) noexcept : of_(std::move(other.of_)), bytes_(std::exchange(other.bytes_, 0)) {}
        lease& operator=(lease&& other) noexcept {
            shrink(0);
            of_ = std::move(other.of_);
            bytes_ = std::exchange(other.bytes_, 0);
            return *this;
        }
        ~lease() { shrink(0); }

        std::uint64_t bytes() const noexcept { return bytes_; }
        void shrink(std::uint64_t to) noexcept {
            if (to >= bytes_) return;
            std::lock_guard lock(of_->mutex);
            of_->used -= bytes_ - to;
            bytes_ = to;
        }

        /// A part of it, of at most its bytes.
        lease split(std::uint64_t bytes) noexcept {
            bytes = std::min(bytes, bytes_);
            bytes_ -= bytes;
            return lease(of_, bytes);
        }

    private:
        friend class memory_budget;
        lease(std::shared_ptr<count> of, std::uint64_t bytes) noexcept : of_(std::move(of)), bytes_(bytes) {}

        std::shared_ptr<count> of_;
        std::uint64_t bytes_ = 0;
    };

    /// Nothing where it would go over the limit.
    std::optional<lease> take(std::uint64_t bytes) {
        std::lock_guard lock(count_->mutex);
        if (bytes > count_->limit - count_->used) return std::nullopt;
        count_->used += bytes;
        return lease(count_, bytes);
    }

    std::uint64_t limit_bytes() const noexcept { return count_->limit; }
    std::uint64_t used_bytes() const noexcept {
        std::lock_guard lock(count_->mutex);
        return count_->used;
    }
    std::uint64_t free_bytes() const noexcept { return limit_bytes() - used_bytes(); }

private:
    std::shared_ptr<count> count_;
};

}  // namespace varve::asio::server
