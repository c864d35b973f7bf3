#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <cerrno>
#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::asio::server {

/// A trainer's memory, mapped here too: it stays when the trainer goes. Nothing here changes it, nor gives any of it back to
/// the system: a trainer whose connection alone has ended goes on using it. Move-only.
class shared_region {
public:
    /// Throws errc::malformed for a descriptor that is no memory of that size, or whose size somebody could still change:
    /// a read beyond its end would end this process.
    shared_region(file_descriptor memory, std::size_t size_bytes) : memory_(std::move(memory)), size_(size_bytes) {
        constexpr int wanted = F_SEAL_SHRINK | F_SEAL_GROW;
        struct stat info{};
        if (::fcntl(memory_.get(), F_GET_SEALS) < 0 || (::fcntl(memory_.get(), F_GET_SEALS) & wanted) != wanted)
            throw error(errc::malformed, "malformed message: a region that is no memory of fixed size (memfd, sealed)");
        if (::fstat(memory_.get(), &info) != 0 || info.st_size < 0 || static_cast<std::size_t>(info.st_size) != size_ || size_ == 0)
            throw error(errc::malformed, "malformed message: a region of another size than it is said to have");
        // Writable, since io_uring takes no memory for itself that is not.
        auto* at = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, memory_.get(), 0);
        if (at == MAP_FAILED) throw_if(last_system_error(errno), "cannot map the trainer's memory");
        data_ = static_cast<std::byte*>(at);
    }
    shared_region(shared_region&& other) noexcept
        : memory_(std::move(other.memory_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    shared_region& operator=(shared_region&&) = delete;
    ~shared_region() {
        if (data_) ::munmap(data_, size_);
    }

    std::span<std::byte> bytes() const noexcept { return {data_, size_}; }

private:
    file_descriptor memory_;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace varve::asio::server
