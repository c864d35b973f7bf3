#include "core.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <exception>

#include "varve/detail/store_folder.hpp"
#include "varve/format/safetensors.hpp"

#include "store_path.hpp"

namespace varve::asio::server {

namespace {

constexpr int most_looks = 10;

file_descriptor open_to_read(std::filesystem::path const& path, system_calls& calls) {
    return {calls.openat(AT_FDCWD, path.c_str(), O_RDONLY | O_NONBLOCK, 0), calls};
}

/// The checkpoints in a folder, newest first; those that cannot be told are left out. Throws
/// std::errc::no_such_file_or_directory where one was let go after it was listed: a newer one may have come.
std::vector<stored_checkpoint> checkpoints_in(std::filesystem::path const& folder, system_calls& calls) {
    safetensors const format;
    std::vector<stored_checkpoint> out;
    file_descriptor fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel());
    if (!fd) return out;
    for (auto const& name : varve::detail::names_in(fd.get())) {
        if (!varve::detail::step_of_name(name, format.extension())) continue;
        try {
            auto const file = open_to_read(folder / name, calls);
            if (!file) {
                std::error_code none;
                if (errno == ENOENT && !std::filesystem::is_symlink(folder / name, none))
                    throw error(std::make_error_code(std::errc::no_such_file_or_directory), (folder / name).string());
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

/// The first on disk after `skip` newer ones, of that step where one is given. Throws as checkpoints_in does.
std::optional<found_image> open_one_of(std::vector<stored_checkpoint> const& on_disk, std::filesystem::path const& folder,
                                       std::optional<std::uint64_t> step, std::uint32_t skip, system_calls& calls) {
    for (auto const& c : on_disk) {
        if ((step && c.step != *step) || skip-- != 0) continue;
        auto fd = open_to_read(folder / c.name, calls);
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

void core::find(std::string const& store, bool over_network, bool at_peer_too, std::shared_ptr<held_store> held, wire::fetch const& what,
                std::function<void(std::optional<found_image>)> good, std::function<void(error const&)> refused) {
    std::lock_guard lock(mutex_);
    if (stopping_) throw error(errc::cancelled, "the monitor is ending");
    start(at_peer_too ? askers_ : readers_,
          [this, store, over_network, at_peer_too, held = std::move(held), what, good = std::move(good), refused = std::move(refused)] {
              try {
                  auto const path = store_path(options_.dir, store, over_network);
                  good(at_peer_too ? find_at_either(path, held.get(), what) : find_here(path, held.get(), what));
              } catch (error const& e) {
                  refused(e);
              } catch (std::exception const& e) {
                  refused(error(std::make_error_code(std::errc::not_enough_memory), e.what()));
              }
          });
}

/// What lingers in memory comes first, though it may be on disk too: a copy that turns out broken leaves the other. But not where
/// somebody has saved without the monitor since.
std::optional<found_image> core::find_here(std::filesystem::path const& path, held_store const* held, wire::fetch const& what) {
    auto const step = what.has_step ? std::optional(what.step) : std::nullopt;
    return looked_up([&]() -> std::optional<found_image> {
        std::vector<stored_checkpoint> on_disk;
        std::exception_ptr unreadable;
        try {
            on_disk = held ? held->checkpoints() : checkpoints_in(path, *options_.calls);
        } catch (error const& e) {
            if (e.code() == std::errc::no_such_file_or_directory) throw;
            unreadable = std::current_exception();
        }
        auto skip = what.skip;
        {
            std::lock_guard lock(mutex_);
            if (!on_disk.empty()) lingering_.drop_older(path, on_disk.front().sequence);
            auto const* kept = lingering_.find(path);
            if (kept && (!step || kept->step == *step) && skip-- == 0) {
                // Open anew, so that nobody gets a descriptor through which it can be changed.
                auto fd = open_to_read("/proc/self/fd/" + std::to_string(kept->memory.get()), system_calls::kernel());
                if (!fd) throw error(last_system_error(errno), "cannot open the checkpoint in memory");
                return found_image{kept->step, kept->sequence, kept->size_bytes, true, "the monitor's memory", std::move(fd)};
            }
        }
        if (unreadable) std::rethrow_exception(unreadable);
        return open_one_of(on_disk, path, step, skip, *options_.calls);
    });
}

std::vector<std::uint64_t> core::steps_here(std::filesystem::path const& path, held_store const* held) {
    auto const on_disk = looked_up([&] { return held ? held->checkpoints() : checkpoints_in(path, *options_.calls); });
    std::vector<std::uint64_t> out;
    {
        std::lock_guard lock(mutex_);
        if (!on_disk.empty()) lingering_.drop_older(path, on_disk.front().sequence);
        if (auto const* kept = lingering_.find(path)) out.push_back(kept->step);
    }
    for (auto const& c : on_disk) out.push_back(c.step);
    return out;
}

}  // namespace varve::asio::server
