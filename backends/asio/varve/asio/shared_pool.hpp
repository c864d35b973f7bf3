#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "varve/detail/block_pool.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::asio {

/// Memory for a staging pool that another process can map too: it stays as it is when this process dies.
///
/// One stretch of addresses, in regions of at most 1 GiB, each a memfd of its own whose size is sealed, so that nobody who
/// has it can make the others fault. Source: memfd_create(2), F_ADD_SEALS in fcntl(2).
///
///     auto pool = std::make_shared<varve::asio::shared_pool>(64 * block_bytes, block_bytes);
///     varve::host_staging staging(pool->memory(), block_bytes, pool);
class shared_pool {
public:
    struct region {
        std::span<std::byte> memory;
        file_descriptor descriptor;
    };

    /// Allocates `pool_bytes`, rounded down to whole blocks but at least one. `block_bytes` is a multiple of block_unit_bytes.
    /// Throws error: std::errc::not_enough_memory, or the system's.
    shared_pool(std::size_t pool_bytes, std::size_t block_bytes)
        : size_bytes_(std::max<std::size_t>(1, pool_bytes / block_bytes) * block_bytes), block_bytes_(block_bytes) {
        // Shared memory is given out for as long as there is any, and beyond that processes are killed.
        auto const whole = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
        if (size_bytes_ > whole) fail("more than this machine has", ENOMEM);
        // The addresses first: the regions then stand side by side.
        void* room = ::mmap(nullptr, size_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room == MAP_FAILED) fail("no addresses", errno);
        memory_ = {static_cast<std::byte*>(room), [size = size_bytes_](std::byte* p) { ::munmap(p, size); }};
        for (auto part : varve::detail::regions_of({memory_.get(), size_bytes_}, block_bytes)) regions_.push_back({part, share(part)});
    }

    /// Memory that is shared already, such as a GPU's: `regions` stand side by side and are cut as a staging cuts its memory, and
    /// `owner` keeps them. `device` says to the monitor what to read them with (see monitor_options::device_memory).
    shared_pool(std::vector<region> regions, std::size_t block_bytes, std::string device, std::shared_ptr<void> owner)
        : block_bytes_(block_bytes), device_(std::move(device)), regions_(std::move(regions)) {
        for (auto const& r : regions_) size_bytes_ += r.memory.size();
        memory_ = {std::move(owner), regions_.empty() ? nullptr : regions_.front().memory.data()};
    }

    shared_pool(shared_pool const&) = delete;
    shared_pool& operator=(shared_pool const&) = delete;

    /// For a staging; it is there as long as this is.
    std::span<std::byte> memory() const noexcept { return {memory_.get(), size_bytes_}; }
    std::size_t block_bytes() const noexcept { return block_bytes_; }
    std::span<region const> regions() const noexcept { return regions_; }
    /// Empty for host memory.
    std::string const& device() const noexcept { return device_; }

private:
    file_descriptor share(std::span<std::byte> part) {
        file_descriptor fd(::memfd_create("varve-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING), system_calls::kernel());
        if (!fd) fail("no shared memory", errno);
        // Memory that is not there would show as a SIGBUS much later.
        if (::ftruncate(fd.get(), static_cast<off_t>(part.size())) != 0 || ::fallocate(fd.get(), 0, 0, static_cast<off_t>(part.size())) != 0)
            fail("no memory", errno == ENOSPC ? ENOMEM : errno);
        if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("it cannot be sealed", errno);
        if (::mmap(part.data(), part.size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd.get(), 0) == MAP_FAILED)
            fail("it cannot be mapped", errno);
        return fd;
    }

    [[noreturn]] void fail(std::string const& what, int why) const {
        auto const code = last_system_error(why);
        throw error(code,
                    "shared staging pool of " + std::to_string(size_bytes_) + " bytes: " + what + ": " + code.message() + "; give a smaller pool");
    }

    std::size_t size_bytes_ = 0;
    std::size_t block_bytes_;
    std::string device_;
    std::shared_ptr<std::byte> memory_;
    std::vector<region> regions_;
};

}  // namespace varve::asio
