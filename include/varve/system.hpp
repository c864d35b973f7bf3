#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <string>

namespace varve {

namespace detail {

/// Makes a system call until no signal interrupts it; its answer, errno with it. Source: signal(7).
template <class Call>
int uninterrupted(Call call) {
    for (;;)
        if (int const answer = call(); answer >= 0 || errno != EINTR) return answer;
}

}  // namespace detail

/// The one seam through which every system call on the way to disk goes, so that a test can record it, fail it or
/// tear it. Each member is the system call of its name: it returns what the call returns and sets errno.
/// Thread-safe. Source: section 2 of the Linux man-pages.
class system_calls {
public:
    virtual ~system_calls() = default;

    virtual int openat(int folder, char const* name, int flags, mode_t mode) { return ::openat(folder, name, flags | O_CLOEXEC, mode); }
    virtual int close(int fd) { return ::close(fd); }
    virtual ssize_t pwrite(int fd, void const* data, std::size_t size, off_t offset) { return ::pwrite(fd, data, size, offset); }
    virtual ssize_t pread(int fd, void* data, std::size_t size, off_t offset) { return ::pread(fd, data, size, offset); }
    virtual int fdatasync(int fd) { return ::fdatasync(fd); }
    virtual int fsync(int fd) { return ::fsync(fd); }
    virtual int ftruncate(int fd, off_t size) { return ::ftruncate(fd, size); }
    virtual int fallocate(int fd, off_t offset, off_t size) { return ::fallocate(fd, 0, offset, size); }
    virtual int renameat(int folder, char const* from, char const* to) { return ::renameat(folder, from, folder, to); }
    virtual int unlinkat(int folder, char const* name) { return ::unlinkat(folder, name, 0); }
    virtual int mkdir(char const* path, mode_t mode) { return ::mkdir(path, mode); }
    virtual int flock(int fd, int operation) { return ::flock(fd, operation); }
    virtual int fstat(int fd, struct stat* out) { return ::fstat(fd, out); }
    /// Who opens the file meanwhile makes the kernel signal the holder; SIGIO would end the process, SIGURG is ignored.
    virtual int setlease(int fd, int lease) {
        if (lease == F_WRLCK && ::fcntl(fd, F_SETSIG, SIGURG) != 0) return -1;
        return ::fcntl(fd, F_SETLEASE, lease);
    }

    /// Asked before a ring is given a write, since that write is no system call of its own. Returns how many of the
    /// bytes to submit (fewer tears the write), or -1 with errno set to fail it without submitting.
    virtual ssize_t ring_write(int fd, void const* data, std::size_t size, off_t offset) {
        (void)fd, (void)data, (void)offset;
        return static_cast<ssize_t>(size);
    }

    /// The calls as the kernel does them.
    static system_calls& kernel() noexcept {
        static system_calls instance;
        return instance;
    }
};

/// A descriptor that closes itself.
class file_descriptor {
public:
    file_descriptor() noexcept = default;
    file_descriptor(int fd, system_calls& calls) noexcept : fd_(fd), calls_(&calls) {}
    file_descriptor(file_descriptor&& other) noexcept : fd_(other.release()), calls_(other.calls_) {}
    file_descriptor& operator=(file_descriptor&& other) noexcept {
        if (this != &other) {
            reset();
            calls_ = other.calls_;
            fd_ = other.release();
        }
        return *this;
    }
    ~file_descriptor() { reset(); }

    int get() const noexcept { return fd_; }
    explicit operator bool() const noexcept { return fd_ >= 0; }
    int release() noexcept {
        int fd = fd_;
        fd_ = -1;
        return fd;
    }
    void reset() noexcept {
        if (fd_ >= 0) calls_->close(fd_);
        fd_ = -1;
    }

private:
    int fd_ = -1;
    system_calls* calls_ = &system_calls::kernel();
};

}  // namespace varve
