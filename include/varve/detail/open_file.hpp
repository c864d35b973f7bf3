#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>

#include "varve/concepts/sink.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::detail {

/// What O_DIRECT asks of addresses, offsets and lengths; a file system with smaller blocks is content with it too.
inline constexpr std::size_t direct_alignment = 4096;

/// How a file sink's writes reach the disk, found out by opening and by writing.
enum class write_mode { untried, direct, buffered };

/// What a file sink has seen so far; shared with its targets. Thread-safe.
class seen_write_mode {
public:
    explicit seen_write_mode(bool wanted) noexcept : wanted_(wanted) {}

    bool wanted() const noexcept { return wanted_; }
    void saw(write_mode m) noexcept { mode_.store(m, std::memory_order_relaxed); }

    std::string describe() const {
        if (!wanted_) return "buffered";
        switch (mode_.load(std::memory_order_relaxed)) {
        case write_mode::direct: return "direct";
        case write_mode::buffered: return "buffered: the file system gives no O_DIRECT";
        case write_mode::untried: break;
        }
        return "direct where the file system gives it";
    }

private:
    bool wanted_;
    std::atomic<write_mode> mode_ = write_mode::untried;
};

/// A file that is being written, under one or two descriptors: what is not aligned cannot go through the direct one.
class open_file {
public:
    /// Creates the file if need be and gives it its size: an image's, or 0 for a stream, which is always buffered since
    /// its writes are of any length. Content within the size stays. Throws error with the system's code.
    open_file(open_request const& r, seen_write_mode& mode, system_calls& calls) : calls_(&calls) {
        buffered_ = {calls.openat(r.folder, r.name.c_str(), O_RDWR | O_CREAT, 0644), calls};
        if (!buffered_) fail(r, "open", "check the folder's permissions");
        struct stat status{};
        if (calls.fstat(buffered_.get(), &status) != 0) fail(r, "look at", "check the disk");
        if (!S_ISREG(status.st_mode))
            throw error(std::make_error_code(std::errc::invalid_argument),
                        "cannot write " + r.name + ": not a regular file; remove it or use another folder");
        if (static_cast<std::uint64_t>(status.st_size) != r.size_bytes && calls.ftruncate(buffered_.get(), static_cast<off_t>(r.size_bytes)) != 0)
            fail(r, "give " + std::to_string(r.size_bytes) + " bytes to", "check the free space and the limit on file sizes (ulimit -f)");
        if (!mode.wanted() || r.size_bytes < direct_alignment) return;
        direct_ = {calls.openat(r.folder, r.name.c_str(), O_RDWR | O_DIRECT, 0), calls};
        if (!direct_ && errno != EINVAL && errno != EOPNOTSUPP) fail(r, "open", "check the limit on open files (ulimit -n)");
        mode.saw(direct_ ? write_mode::direct : write_mode::buffered);
    }

    int direct() const noexcept { return direct_.get(); }  ///< -1 where there is none
    int buffered() const noexcept { return buffered_.get(); }

    /// Both descriptors are of one file: a sync of one covers what went through the other. An error stays, since the
    /// kernel reports it once and may have dropped the pages. Source: fdatasync(2).
    std::error_code sync() noexcept {
        if (failed_) return failed_;
        if (uninterrupted([this] { return calls_->fdatasync(buffered_.get()); }) != 0) failed_ = last_system_error(errno);
        return failed_;
    }

private:
    [[noreturn]] static void fail(open_request const& r, std::string const& what, std::string const& advice) {
        auto code = last_system_error(errno);
        throw error(code, "cannot " + what + " " + r.name + ": " + code.message() + "; " + advice);
    }

    system_calls* calls_;
    file_descriptor buffered_, direct_;
    std::error_code failed_;
};

}  // namespace varve::detail
