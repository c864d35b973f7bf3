#pragma once

#include <liburing.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "varve/concepts/sink.hpp"

namespace varve::uring {

/// The staging memory that a ring has pinned for itself, so that no write has to pin its pages again.
///
/// A region is registered in pieces of at most 1 GiB, the kernel's limit; where it refuses one, writes from there work
/// all the same, and describe() says what to raise. Add everything before the first write. Source: io_uring_register(2).
class registered_memory {
public:
    /// Makes room for buffers in a ring that outlives this.
    void prepare(io_uring* ring) noexcept {
        ring_ = ring;
        int result = ::io_uring_register_buffers_sparse(ring, max_entries);
        usable_ = result == 0;
        if (!usable_) refusal_ = -result;
    }

    /// Returns the slot of the region, or `unregistered` where nothing of it could be registered.
    int add(std::span<std::byte> region) {
        region_of r{region.data(), region.size(), {}};
        bool any = false;
        for (std::size_t at = 0; at < region.size(); at += max_entry_bytes) {
            auto part = region.subspan(at, std::min(max_entry_bytes, region.size() - at));
            wanted_bytes_ += part.size();
            r.entries.push_back(add_entry(part));
            any = any || r.entries.back() >= 0;
        }
        if (!any) return unregistered;
        regions_.push_back(std::move(r));
        return static_cast<int>(regions_.size()) - 1;
    }

    /// The ring's index of the buffer that holds these bytes of the slot's region; -1 where none does.
    int entry_of(int slot, std::byte const* data, std::size_t size) const noexcept {
        if (slot < 0 || static_cast<std::size_t>(slot) >= regions_.size()) return -1;
        auto const& r = regions_[static_cast<std::size_t>(slot)];
        auto address = reinterpret_cast<std::uintptr_t>(data), base = reinterpret_cast<std::uintptr_t>(r.base);
        if (address < base || address - base > r.size || size > r.size - (address - base)) return -1;
        auto first = (address - base) / max_entry_bytes, last = (address - base + size - 1) / max_entry_bytes;
        return first == last ? r.entries[first] : -1;
    }

    std::string describe() const {
        if (wanted_bytes_ == 0) return "no registered memory";
        if (refusal_ == 0) return "registered memory";
        std::string how = registered_bytes_ == 0 ? "unregistered memory" : "memory partly registered";
        return how + " (" + std::to_string((wanted_bytes_ - registered_bytes_) >> 20) + " MiB refused: " + reason() + ")";
    }

private:
    static constexpr std::size_t max_entry_bytes = 1u << 30;
    static constexpr unsigned max_entries = 1024;

    struct region_of {
        std::byte* base;
        std::size_t size;
        std::vector<int> entries;  ///< one a GiB; -1 where refused
    };

    int add_entry(std::span<std::byte> part) noexcept {
        if (!usable_) return -1;
        if (used_ == max_entries) {
            refusal_ = ENOSPC;
            return -1;
        }
        iovec v{part.data(), part.size()};
        std::uint64_t tag = 0;
        static_assert(sizeof(__u64) == sizeof(std::uint64_t));
        int result = ::io_uring_register_buffers_update_tag(ring_, used_, &v, reinterpret_cast<__u64*>(&tag), 1);
        if (result != 1) {
            refusal_ = result < 0 ? -result : EIO;
            return -1;
        }
        registered_bytes_ += part.size();
        return static_cast<int>(used_++);
    }

    std::string reason() const {
        if (refusal_ == ENOMEM) {
            rlimit limit{};
            ::getrlimit(RLIMIT_MEMLOCK, &limit);
            if (limit.rlim_cur != RLIM_INFINITY)
                return "raise RLIMIT_MEMLOCK, which is " + std::to_string(limit.rlim_cur >> 10) + " KiB (ulimit -l, LimitMEMLOCK=)";
        }
        if (refusal_ == ENOSPC) return "more than " + std::to_string(max_entries) + " pieces of 1 GiB";
        return std::system_category().message(refusal_);
    }

    io_uring* ring_ = nullptr;
    bool usable_ = false;
    int refusal_ = 0;
    unsigned used_ = 0;
    std::size_t wanted_bytes_ = 0;
    std::size_t registered_bytes_ = 0;
    std::vector<region_of> regions_;
};

}  // namespace varve::uring
