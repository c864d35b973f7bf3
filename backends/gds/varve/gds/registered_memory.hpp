#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/gds/cufile.hpp"
#include "varve/gds/error.hpp"

namespace varve::gds {

/// The staging memory that cuFile was told of; where it refuses a region, writes from there work all the same, and
/// describe() says why. Add everything before the first write.
class registered_memory {
public:
    explicit registered_memory(std::shared_ptr<cufile> calls) : calls_(std::move(calls)) {}
    registered_memory(registered_memory const&) = delete;
    registered_memory& operator=(registered_memory const&) = delete;
    ~registered_memory() {
        for (auto r : regions_) calls_->remove_memory(r.data());
    }

    /// Returns the slot of the region, or `unregistered`: host memory needs none.
    int add(std::span<std::byte> region) {
        if (!calls_->in_device_memory(region.data())) return unregistered;
        if (int failure = calls_->add_memory(region)) {
            refused_bytes_ += region.size();
            refusal_ = failure;
            return unregistered;
        }
        regions_.push_back(region);
        return static_cast<int>(regions_.size()) - 1;
    }

    /// The address by which cuFile knows these bytes: that of the slot's region if they lie in it, else their own.
    std::byte* base_of(int slot, std::byte* data, std::size_t size) const noexcept {
        if (slot < 0 || static_cast<std::size_t>(slot) >= regions_.size()) return data;
        auto const r = regions_[static_cast<std::size_t>(slot)];
        auto const at = reinterpret_cast<std::uintptr_t>(data) - reinterpret_cast<std::uintptr_t>(r.data());
        return at < r.size() && size <= r.size() - at ? r.data() : data;
    }

    std::string describe() const {
        if (refused_bytes_ > 0) return std::to_string(refused_bytes_ >> 20) + " MiB unregistered (" + code_of(refusal_).message() + ")";
        return regions_.empty() ? "no registered memory" : "registered memory";
    }

private:
    std::shared_ptr<cufile> calls_;
    std::vector<std::span<std::byte>> regions_;
    std::size_t refused_bytes_ = 0;
    int refusal_ = 0;
};

}  // namespace varve::gds
