#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace varve {

/// A staging buffer's bytes, kept as they are beyond the buffer's own life: they are free again only when the buffer was
/// given back and its loan too. Move-only; gives itself back, on any thread. An empty loan keeps nothing.
class loan {
public:
    loan() noexcept = default;
    /// `end(pool, index)` is called once; `pool` stays until then.
    loan(std::shared_ptr<void> pool, std::size_t index, void (*end)(void* pool, std::size_t index) noexcept) noexcept
        : pool_(std::move(pool)), index_(index), end_(end) {}
    loan(loan&& other) noexcept : pool_(std::move(other.pool_)), index_(other.index_), end_(other.end_) {}
    loan& operator=(loan&& other) noexcept {
        if (this != &other) {
            reset();
            pool_ = std::move(other.pool_);
            index_ = other.index_;
            end_ = other.end_;
        }
        return *this;
    }
    ~loan() { reset(); }

    explicit operator bool() const noexcept { return pool_ != nullptr; }
    void reset() noexcept {
        if (auto pool = std::move(pool_)) end_(pool.get(), index_);
    }

    /// Never gives itself back: the bytes stay as they are for as long as there is the pool, which is not kept for it.
    void keep_for_good() noexcept { pool_.reset(); }

private:
    std::shared_ptr<void> pool_;
    std::size_t index_ = 0;
    void (*end_)(void*, std::size_t) noexcept = nullptr;
};

}  // namespace varve
