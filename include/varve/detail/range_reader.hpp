#pragma once

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "varve/detail/header_source.hpp"
#include "varve/system.hpp"

namespace varve::detail {

/// Memory for direct reads, aligned to 4,096 bytes.
class aligned_buffer {
public:
    explicit aligned_buffer(std::size_t size_bytes)
        : data_(static_cast<std::byte*>(std::aligned_alloc(4096, (size_bytes + 4095) / 4096 * 4096))), size_bytes_(size_bytes) {
        if (!data_) throw std::bad_alloc();
    }
    std::byte* data() const noexcept { return data_.get(); }
    std::size_t size_bytes() const noexcept { return size_bytes_; }

private:
    struct free_memory {
        void operator()(std::byte* p) const noexcept { std::free(p); }
    };
    std::unique_ptr<std::byte, free_memory> data_;
    std::size_t size_bytes_;
};

/// Reads a file's ranges: what the page cache holds comes from there, the rest past it through a second, direct
/// descriptor; all through the page cache where the file system has no direct reads. Const members are thread-safe.
class range_reader {
public:
    /// `fd` stays open as long as this.
    explicit range_reader(int fd) : fd_(fd) {
        auto path = "/proc/self/fd/" + std::to_string(fd);
        direct_ = file_descriptor(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC), system_calls::kernel());
        touch_ = file_descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC), system_calls::kernel());
        if (touch_) ::posix_fadvise(touch_.get(), 0, 0, POSIX_FADV_RANDOM);
    }

    static constexpr std::size_t alignment = 4096;
    /// What the memory given to read needs beyond the bytes asked for.
    static constexpr std::size_t slack_bytes = 2 * alignment;

    /// Whether the byte at `offset` is in the page cache: what begins there is worth a try of read_cached. That one starts to
    /// read ahead where it fails (Linux 6), and the disk would read the same bytes twice; this one costs a page at most.
    bool is_cached(std::uint64_t offset) const noexcept {
        std::byte byte{};
        iovec one{&byte, 1};
        return !touch_ || !direct_ || ::preadv2(touch_.get(), &one, 1, static_cast<off_t>(offset), RWF_NOWAIT) == 1;
    }

    /// How many bytes at the front of [offset, offset + size) came without waiting for the disk; 0 where nothing is known
    /// about the page cache.
    std::size_t read_cached(std::byte* to, std::uint64_t offset, std::size_t size) const noexcept {
        std::size_t done = 0;
        while (done < size) {
            iovec piece{to + done, size - done};
            auto n = ::preadv2(fd_, &piece, 1, static_cast<off_t>(offset + done), RWF_NOWAIT);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) break;
            done += static_cast<std::size_t>(n);
        }
        return done;
    }

    /// Reads [offset + done, offset + size) to `to` + done; the first `done` bytes are there already. `to` lies as far behind
    /// an aligned address as `offset` does, and from there on to the next one behind the end all memory is the caller's.
    void read(std::byte* to, std::uint64_t offset, std::size_t size, std::size_t done) const {
        if (direct_ && read_direct(to - offset % alignment, offset, size, done)) return;
        read_exactly(fd_, to + done, size - done, offset + done);
    }

private:
    /// Reads what lies behind the first `done` bytes; false where the file system refuses. The aligned range begins at `scratch`.
    bool read_direct(std::byte* scratch, std::uint64_t offset, std::size_t size, std::size_t done) const {
        auto const base = offset - offset % alignment;
        auto const end = offset + size;
        for (auto at = (offset + done) / alignment * alignment; at < end;) {
            auto want = (end - at + alignment - 1) / alignment * alignment;
            auto n = ::pread(direct_.get(), scratch + (at - base), want, static_cast<off_t>(at));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && errno == EINVAL) return false;
            if (n < 0) throw_if(last_system_error(errno), "cannot read at byte " + std::to_string(at));
            at += static_cast<std::uint64_t>(n);
            if (at >= end) break;
            // A read that ends off the alignment ended with the file, or was cut short: the rest comes buffered.
            if (n == 0 || at % alignment != 0) {
                read_exactly(fd_, scratch + (at - base), static_cast<std::size_t>(end - at), at);
                break;
            }
        }
        return true;
    }

    int fd_;
    file_descriptor direct_;
    file_descriptor touch_;  ///< one that does not read ahead
};

}  // namespace varve::detail
