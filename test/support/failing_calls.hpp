#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <functional>

#include "varve/system.hpp"

namespace varve_test {

/// System calls that a test counts, fails and tears. What a hook returns is taken as the size to write: less than asked
/// for tears the write, 0 or above; below 0 it is a negative errno and nothing is written. Set hooks before the first call.
class failing_calls : public varve::system_calls {
public:
    using write_hook = std::function<ssize_t(std::size_t call, std::size_t size)>;

    write_hook on_write;              ///< of pwrite and ring_write, which are counted together from 0
    std::function<int(int)> on_sync;  ///< errno of the n-th fdatasync, or 0
    std::function<int(int)> on_open;  ///< errno for these flags, or 0
    int truncate_error = 0;           ///< errno of every ftruncate, or 0
    std::atomic<std::size_t> writes{0}, syncs{0}, opened{0}, closed{0};

    int openat(int folder, char const* name, int flags, mode_t mode) override {
        if (int e = on_open ? on_open(flags) : 0) return fail(e);
        int fd = system_calls::openat(folder, name, flags, mode);
        if (fd >= 0) ++opened;
        return fd;
    }
    int close(int fd) override {
        ++closed;
        return system_calls::close(fd);
    }
    ssize_t pwrite(int fd, void const* data, std::size_t size, off_t offset) override {
        auto allowed = ask(size);
        return allowed < 0 ? -1 : system_calls::pwrite(fd, data, static_cast<std::size_t>(allowed), offset);
    }
    ssize_t ring_write(int, void const*, std::size_t size, off_t) override { return ask(size); }
    int fdatasync(int fd) override {
        int n = static_cast<int>(syncs++);
        if (int e = on_sync ? on_sync(n) : 0) return fail(e);
        return system_calls::fdatasync(fd);
    }
    int ftruncate(int fd, off_t size) override { return truncate_error ? fail(truncate_error) : system_calls::ftruncate(fd, size); }

private:
    static int fail(int e) {
        errno = e;
        return -1;
    }
    ssize_t ask(std::size_t size) {
        auto n = writes++;
        auto allowed = on_write ? on_write(n, size) : static_cast<ssize_t>(size);
        return allowed < 0 ? fail(static_cast<int>(-allowed)) : allowed;
    }
};

}  // namespace varve_test
