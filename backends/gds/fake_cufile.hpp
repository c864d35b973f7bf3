#pragma once

#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>

#include "varve/gds/cufile.hpp"

namespace varve_test {

/// cuFile without a GPU: all memory is taken for a GPU's where a test says so, and files are written with pwrite. What a
/// test may do to it: hooks answer with how many of the bytes to transfer or, below 0, a negative failure. Set them first.
class fake_cufile final : public varve::gds::cufile {
public:
    std::function<std::int64_t(std::size_t call, std::size_t size)> on_transfer;
    int open_failure = 0, memory_failure = 0, copy_failure = 0;
    bool device_memory = true;
    std::atomic<std::size_t> transfers{0}, copies{0}, copied_bytes{0}, opened{0}, closed{0}, added{0}, removed{0};
    std::atomic<bool> base_is_known{true};  ///< of every transfer, once memory was added

    int open_file(int fd, file& out) noexcept override {
        if (open_failure != 0) return open_failure;
        ++opened;
        out = new int(fd);
        return 0;
    }
    void close_file(file f) noexcept override {
        ++closed;
        delete static_cast<int*>(f);
    }
    bool in_device_memory(void const*) const noexcept override { return device_memory; }
    int add_memory(std::span<std::byte> region) noexcept override {
        if (memory_failure != 0) return memory_failure;
        ++added;
        std::lock_guard lock(mutex_);
        regions_.insert(region.data());
        return 0;
    }
    void remove_memory(std::byte* base) noexcept override {
        ++removed;
        std::lock_guard lock(mutex_);
        regions_.erase(base);
    }
    std::int64_t write(file f, std::byte const* base, std::size_t at, std::size_t size, std::uint64_t offset) noexcept override {
        return transfer(size, base, [&](std::size_t n) { return ::pwrite(*static_cast<int*>(f), base + at, n, static_cast<off_t>(offset)); });
    }
    std::int64_t read(file f, std::byte* base, std::size_t at, std::size_t size, std::uint64_t offset) noexcept override {
        return transfer(size, base, [&](std::size_t n) { return ::pread(*static_cast<int*>(f), base + at, n, static_cast<off_t>(offset)); });
    }
    std::shared_ptr<std::byte> host_memory(std::size_t size) override {
        return {static_cast<std::byte*>(std::aligned_alloc(4096, size)), [](std::byte* p) { std::free(p); }};
    }
    int copy(std::byte* to, std::byte const* from, std::size_t size) noexcept override {
        if (copy_failure != 0) return copy_failure;
        ++copies;
        copied_bytes += size;
        std::copy(from, from + size, to);
        return 0;
    }
    std::string describe() const override { return "fake cuFile"; }

private:
    template <class Call>
    std::int64_t transfer(std::size_t size, std::byte const* base, Call call) noexcept {
        auto const n = transfers++;
        {
            std::lock_guard lock(mutex_);
            if (!regions_.empty() && !regions_.contains(base)) base_is_known = false;
        }
        auto allowed = on_transfer ? on_transfer(n, size) : static_cast<std::int64_t>(size);
        if (allowed < 0) return allowed;
        auto done = call(static_cast<std::size_t>(allowed));
        return done < 0 ? -errno : done;
    }

    std::mutex mutex_;
    std::set<std::byte const*> regions_;
};

}  // namespace varve_test
