#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace varve_test {

/// Host memory for the snapshots of a test's staging. Copies share it.
class snapshot_rooms {
    struct shared {
        std::mutex mutex;
        std::vector<std::unique_ptr<std::vector<std::byte>>> free;
    };

public:
    /// Room for one; gives itself back.
    class slot {
    public:
        slot() = default;
        slot(std::shared_ptr<shared> of, std::unique_ptr<std::vector<std::byte>> bytes) : of_(std::move(of)), bytes_(std::move(bytes)) {}
        slot(slot&&) = default;
        slot& operator=(slot&& other) noexcept {
            std::swap(of_, other.of_);
            std::swap(bytes_, other.bytes_);
            return *this;
        }
        ~slot() {
            if (!bytes_) return;
            std::lock_guard lock(of_->mutex);
            of_->free.push_back(std::move(bytes_));
        }
        explicit operator bool() const { return bytes_ != nullptr; }
        std::vector<std::byte>& bytes() const { return *bytes_; }

    private:
        std::shared_ptr<shared> of_;
        std::unique_ptr<std::vector<std::byte>> bytes_;
    };

    void make(std::size_t count, std::size_t bytes) {
        for (std::size_t i = 0; i < count; ++i) shared_->free.push_back(std::make_unique<std::vector<std::byte>>(bytes));
    }
    slot acquire() noexcept {
        std::lock_guard lock(shared_->mutex);
        if (shared_->free.empty()) return {};
        auto bytes = std::move(shared_->free.back());
        shared_->free.pop_back();
        return {shared_, std::move(bytes)};
    }

private:
    std::shared_ptr<shared> shared_ = std::make_shared<shared>();
};

}  // namespace varve_test
