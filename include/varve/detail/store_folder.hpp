#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "varve/error.hpp"
#include "varve/system.hpp"
#include "varve/version.hpp"

namespace varve::detail {

inline constexpr std::string_view mark_name = ".varve";
inline constexpr std::string_view partial_prefix = ".partial-";
inline constexpr int store_version = 1;
inline constexpr std::size_t most_mark_bytes = 4096;

/// The largest step that a checkpoint's name has room for.
inline constexpr std::uint64_t last_step = 999'999'999'999;

/// "step-000000000120.safetensors".
inline std::string checkpoint_name(std::uint64_t step, std::string_view extension) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "step-%012llu", static_cast<unsigned long long>(step));
    return std::string(digits) + std::string(extension);
}

/// The step in a checkpoint's name with that extension, or nothing.
inline std::optional<std::uint64_t> step_of_name(std::string_view name, std::string_view extension) {
    constexpr std::string_view prefix = "step-";
    constexpr std::size_t digits = 12;
    if (name.size() != prefix.size() + digits + extension.size() || !name.starts_with(prefix) || !name.ends_with(extension)) return std::nullopt;
    std::uint64_t step = 0;
    for (char c : name.substr(prefix.size(), digits)) {
        if (c < '0' || c > '9') return std::nullopt;
        step = step * 10 + static_cast<std::uint64_t>(c - '0');
    }
    return step;
}

/// Whether a checkpoint of some format of ours has such a name.
inline bool is_checkpoint_name(std::string_view name) { return step_of_name(name, ".safetensors") || step_of_name(name, ".pt"); }

/// The names in a folder, but for "." and "..", unsorted.
inline std::vector<std::string> names_in(int folder) {
    std::vector<std::string> names;
    int copy = ::openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    std::unique_ptr<DIR, int (*)(DIR*)> stream(copy < 0 ? nullptr : ::fdopendir(copy), ::closedir);
    auto const refuse = [] { throw error(last_system_error(errno), "cannot list the store's folder"); };
    if (!stream) {
        auto const why = errno;
        if (copy >= 0) ::close(copy);
        errno = why;
        refuse();
    }
    for (;;) {
        errno = 0;
        auto const* entry = ::readdir(stream.get());
        if (!entry && errno != 0) refuse();
        if (!entry) return names;
        std::string_view name = entry->d_name;
        if (name != "." && name != "..") names.emplace_back(name);
    }
}

/// What a store's mark says.
struct store_mark {
    int version = store_version;
    std::string made_by;
};

/// The mark in `folder`; nothing if there is none, or one that a crash left empty. Throws errc::not_a_store for another's.
inline std::optional<store_mark> read_mark(int folder, std::filesystem::path const& shown) {
    // Without O_NONBLOCK a FIFO would wait for a writer.
    file_descriptor fd(::openat(folder, mark_name.data(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    if (!fd) return std::nullopt;
    auto refuse = [&] { throw error(errc::not_a_store, shown.string() + ": its .varve is no mark of a checkpoint store; give another folder"); };
    struct stat info{};
    if (::fstat(fd.get(), &info) == 0 && !S_ISREG(info.st_mode)) refuse();
    std::string text(most_mark_bytes, '\0');
    auto n = ::pread(fd.get(), text.data(), text.size(), 0);
    text.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    if (text.empty()) return std::nullopt;
    auto json = nlohmann::json::parse(text, nullptr, false);
    if (!json.is_object() || !json.contains("varve_store") || !json["varve_store"].is_number_integer()) refuse();
    auto const& version = json["varve_store"];
    if (version.get<double>() < 1) refuse();
    if (version.get<double>() > store_version)  // of any size
        throw error(errc::not_a_store, shown.string() + ": a store of version " + version.dump() + ", this varve knows " +
                                           std::to_string(store_version) + "; use a newer varve");
    return store_mark{version.get<int>(), json.contains("made_by") && json["made_by"].is_string() ? json["made_by"].get<std::string>() : ""};
}

inline int fsync_file(system_calls& calls, int fd) noexcept {
    return uninterrupted([&] { return calls.fsync(fd); });
}

/// A folder's one name: from the root, without dots and without a slash behind it.
inline std::filesystem::path absolute_folder(std::filesystem::path const& folder) {
    auto normal = std::filesystem::absolute(folder).lexically_normal();
    return normal.has_filename() ? normal : normal.parent_path();
}

/// Makes the folder and those above it; every one that it makes is durable, with its entry in its parent. Throws error.
inline void make_folders(std::filesystem::path const& p, system_calls& calls) {
    struct stat info{};
    if (p.empty()) return;
    if (::stat(p.c_str(), &info) == 0) {
        if (!S_ISDIR(info.st_mode)) throw error(std::make_error_code(std::errc::not_a_directory), p.string() + ": is no folder");
        return;
    }
    if (p.has_parent_path() && p.parent_path() != p) make_folders(p.parent_path(), calls);
    if (calls.mkdir(p.c_str(), 0777) != 0 && errno != EEXIST) throw_if(last_system_error(errno), p.string() + ": cannot create the store's folder");
    for (auto const& made : {p, p.parent_path()}) {
        file_descriptor const fd(calls.openat(AT_FDCWD, made.c_str(), O_RDONLY | O_DIRECTORY, 0), calls);
        if (!fd || fsync_file(calls, fd.get()) != 0) throw_if(last_system_error(errno), made.string() + ": cannot make the new folder durable");
    }
}

/// The folder of a store, open and locked for its one writer.
class store_folder {
public:
    /// Opens or makes it; every folder that it makes is durable, with its entry in its parent. Throws errc::not_a_store
    /// where somebody else's files are, errc::store_locked where another process writes.
    store_folder(std::filesystem::path const& path, std::string const& made_by, system_calls& calls) : calls_(&calls), path_(absolute_folder(path)) {
        make_folders(path_, *calls_);
        folder_ = open_folder(path_);
        auto mark = read_mark(folder_.get(), path_);
        if (!mark) {
            for (auto const& name : names_in(folder_.get()))
                if (name != mark_name)
                    throw error(errc::not_a_store,
                                path_.string() + ": not empty and not a checkpoint store (it holds " + name + "); give an empty or new folder");
        }
        lock();
        if (!read_mark(folder_.get(), path_)) write_mark(made_by);  // asked again: another writer may have been here meanwhile
        // Whoever wrote it may have died before it was durable: checkpoints beside a mark that a power cut empties are in no store.
        if (fsync_file(*calls_, mark_.get()) != 0) throw_if(last_system_error(errno), path_.string() + ": cannot make the store's mark durable");
        throw_if(sync(), path_.string() + ": cannot make the store's mark durable");
        // And whoever made the folder before its entry was; a parent that may not be read was there before varve.
        if (file_descriptor const parent(calls_->openat(AT_FDCWD, path_.parent_path().c_str(), O_RDONLY | O_DIRECTORY, 0), *calls_); parent)
            if (fsync_file(*calls_, parent.get()) != 0 && errno != EINVAL && errno != EROFS)  // of those there is none to be synced
                throw_if(last_system_error(errno), path_.string() + ": cannot make the store's folder durable");
    }

    store_folder(store_folder const&) = delete;
    store_folder& operator=(store_folder const&) = delete;
    /// A process that was forked meanwhile has the lock's file open too: it is given back, not only closed.
    ~store_folder() {
        if (mark_ && owner_ == ::getpid()) calls_->flock(mark_.get(), LOCK_UN);
    }

    int get() const noexcept { return folder_.get(); }
    std::filesystem::path const& path() const noexcept { return path_; }

    std::error_code sync() noexcept { return fsync_file(*calls_, folder_.get()) == 0 ? std::error_code{} : last_system_error(errno); }

private:
    file_descriptor open_folder(std::filesystem::path const& p) {
        file_descriptor fd(calls_->openat(AT_FDCWD, p.c_str(), O_RDONLY | O_DIRECTORY, 0), *calls_);
        if (!fd) throw_if(last_system_error(errno), p.string() + ": cannot open the store's folder");
        return fd;
    }

    void lock() {
        mark_ = file_descriptor(calls_->openat(folder_.get(), mark_name.data(), O_RDWR | O_CREAT, 0666), *calls_);
        if (!mark_) throw_if(last_system_error(errno), (path_ / mark_name).string() + ": cannot open for writing; check the folder's permissions");
        if (calls_->flock(mark_.get(), LOCK_EX | LOCK_NB) != 0) {
            if (errno == EWOULDBLOCK)
                throw error(errc::store_locked, path_.string() + ": another process is writing to this store; wait for it or give another folder");
            throw_if(last_system_error(errno), path_.string() + ": cannot lock the store");
        }
    }

    void write_mark(std::string const& made_by) {
        nlohmann::json const mark{{"varve_store", store_version}, {"made_by", made_by}, {"version", VARVE_VERSION}};
        auto const text = mark.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
        if (text.size() > most_mark_bytes)
            throw error(
                std::make_error_code(std::errc::invalid_argument),
                path_.string() + ": the name of who makes the store takes too many bytes in its mark, which has " + std::to_string(most_mark_bytes));
        auto fail = [this] {
            auto const ec = last_system_error(errno);
            calls_->ftruncate(mark_.get(), 0);  // half a mark would be taken for somebody else's; an empty one is written again
            throw_if(ec, (path_ / mark_name).string() + ": cannot write the store's mark");
        };
        for (std::size_t done = 0; done < text.size();) {
            auto n = calls_->pwrite(mark_.get(), text.data() + done, text.size() - done, static_cast<off_t>(done));
            if (n < 0 && errno == EINTR) continue;
            if (n == 0) errno = EIO;
            if (n <= 0) fail();
            done += static_cast<std::size_t>(n);
        }
        if (fsync_file(*calls_, mark_.get()) != 0) fail();
    }

    system_calls* calls_;
    std::filesystem::path path_;
    file_descriptor folder_;
    file_descriptor mark_;
    pid_t const owner_ = ::getpid();
};

}  // namespace varve::detail
