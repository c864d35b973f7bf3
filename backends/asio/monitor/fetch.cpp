#include "core.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>

#include "varve/detail/store_folder.hpp"
#include "varve/format/safetensors.hpp"

#include "store_path.hpp"

namespace varve::asio::server {

namespace {

constexpr int most_looks = 10;

file_descriptor open_to_read(std::filesystem::path const& path) {
    return {::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel()};
}

/// The checkpoints in a folder, newest first; those that cannot be told are left out. Throws
/// std::errc::no_such_file_or_directory where one was let go after it was listed: a newer one may have come.
std::vector<stored_checkpoint> checkpoints_in(std::filesystem::path const& folder) {
    safetensors const format;
    std::vector<stored_checkpoint> out;
    file_descriptor fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel());
    if (!fd) return out;
    for (auto const& name : varve::detail::names_in(fd.get())) {
        if (!varve::detail::step_of_name(name, format.extension())) continue;
        try {
            auto const file = open_to_read(folder / name);
            if (!file) {
                if (errno == ENOENT) throw_if(last_system_error(errno), (folder / name).string());
                continue;
            }
            auto const found = format.identify(file.get());
            out.push_back({found.step, found.sequence, name});
        } catch (error const& e) {
            if (e.code() == std::errc::no_such_file_or_directory) throw;
        }
    }
    std::sort(out.begin(), out.end(), [](auto const& a, auto const& b) { return a.sequence > b.sequence; });
    return out;
}

/// The checkpoint on disk that comes after `skip` newer ones, of that step where one is given. Throws as checkpoints_in does.
std::optional<found_image> find_on_disk(std::filesystem::path const& folder, held_store const* held, std::optional<std::uint64_t> step,
                                        std::uint32_t skip) {
    for (auto const& c : held ? held->checkpoints() : checkpoints_in(folder)) {
        if ((step && c.step != *step) || skip-- != 0) continue;
        auto fd = open_to_read(folder / c.name);
        struct stat info{};
        if (!fd || ::fstat(fd.get(), &info) != 0) throw_if(last_system_error(errno), (folder / c.name).string());
        return found_image{c.step, c.sequence, static_cast<std::uint64_t>(info.st_size), false, (folder / c.name).string(), std::move(fd)};
    }
    return std::nullopt;
}

/// What `look` finds. A save that became durable meanwhile lets go of an older one: then it looks again.
template <class Look>
auto looked_up(Look look) {
    for (int looks = 1;; ++looks) {
        try {
            return look();
        } catch (error const& e) {
            if (e.code() != std::errc::no_such_file_or_directory || looks == most_looks) throw;
        }
    }
}

}  // namespace

/// What lingers in memory comes first, though it may be on disk too: a copy that turns out broken leaves the other.
std::optional<found_image> core::find(std::string const& store, bool over_network, held_store const* held, wire::fetch const& what) {
    return find_here(store_path(options_.dir, store, over_network), held, what);
}

std::optional<found_image> core::find_here(std::filesystem::path const& path, held_store const* held, wire::fetch const& what) {
    auto const step = what.has_step ? std::optional(what.step) : std::nullopt;
    auto skip = what.skip;
    {
        std::lock_guard lock(mutex_);
        auto const* kept = lingering_.find(path);
        if (kept && (!step || kept->step == *step) && skip-- == 0) {
            // Open anew, so that nobody gets a descriptor through which it can be changed.
            auto fd = open_to_read("/proc/self/fd/" + std::to_string(kept->memory.get()));
            if (!fd) throw_if(last_system_error(errno), "cannot open the checkpoint in memory");
            return found_image{kept->step, kept->sequence, kept->size_bytes, true, "the monitor's memory", std::move(fd)};
        }
    }
    return looked_up([&] { return find_on_disk(path, held, step, skip); });
}

std::vector<std::uint64_t> core::steps_here(std::filesystem::path const& path, held_store const* held) {
    std::vector<std::uint64_t> out;
    {
        std::lock_guard lock(mutex_);
        if (auto const* kept = lingering_.find(path)) out.push_back(kept->step);
    }
    for (auto const& c : looked_up([&] { return held ? held->checkpoints() : checkpoints_in(path); })) out.push_back(c.step);
    return out;
}

}  // namespace varve::asio::server
