#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>

#include "varve/detail/text.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::tool {

/// A file that appears under its name only when it is whole and durable: until commit() it has no name, or where the file system
/// cannot do that another one, and it is gone if commit() is never called.
class atomic_file {
public:
    /// Throws varve::error.
    explicit atomic_file(std::filesystem::path path) : path_(std::move(path)) {
        auto folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
        folder_ = file_descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel());
        if (!folder_) fail(folder);
        name_ = path_.filename().string();
        struct stat there{};
        if (::fstatat(folder_.get(), name_.c_str(), &there, 0) == 0 && S_ISDIR(there.st_mode)) errno = EISDIR, fail(path_);
        fd_ = file_descriptor(::openat(folder_.get(), ".", O_RDWR | O_TMPFILE | O_CLOEXEC, 0666), system_calls::kernel());
        if (fd_) return;
        auto const name = another_name();
        fd_ = file_descriptor(::openat(folder_.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666), system_calls::kernel());
        if (!fd_) fail(path_);
        temporary_ = name;
    }
    atomic_file(atomic_file const&) = delete;
    atomic_file& operator=(atomic_file const&) = delete;
    ~atomic_file() {
        if (!temporary_.empty()) ::unlinkat(folder_.get(), temporary_.c_str(), 0);
    }

    int fd() const noexcept { return fd_.get(); }

    void write(std::span<std::byte const> bytes, std::uint64_t offset) {
        for (std::size_t done = 0; done < bytes.size();) {
            auto n = ::pwrite(fd_.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) fail(path_);
            done += static_cast<std::size_t>(n);
        }
    }

    void commit() {
        if (::fdatasync(fd_.get()) != 0) fail(path_);
        if (temporary_.empty()) {
            auto const open = "/proc/self/fd/" + std::to_string(fd_.get());
            auto const name = another_name();
            if (::linkat(AT_FDCWD, open.c_str(), folder_.get(), name.c_str(), AT_SYMLINK_FOLLOW) != 0) fail(path_);
            temporary_ = name;
        }
        if (::renameat(folder_.get(), temporary_.c_str(), folder_.get(), name_.c_str()) != 0) fail(path_);
        temporary_.clear();
        if (::fsync(folder_.get()) != 0) fail(path_);
    }

private:
    /// Nobody else's: two processes may have one number, each in its container.
    static std::string another_name() {
        return ".varve-" + std::to_string(::getpid()) + "-" + std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()) +
               ".partial";
    }
    [[noreturn]] static void fail(std::filesystem::path const& where) {
        auto code = last_system_error(errno);
        throw error(code, "cannot write " + detail::printable(where.string()) + ": " + code.message());
    }

    std::filesystem::path path_;
    std::string name_;
    std::string temporary_;  ///< empty: it has none
    file_descriptor folder_;
    file_descriptor fd_;
};

}  // namespace varve::tool
