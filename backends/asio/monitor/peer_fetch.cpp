#include "core.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>

#include "client/relay.hpp"
#include "varve/detail/text.hpp"

namespace varve::asio::server {

namespace {

/// A file without a name on the store's own disk, which counts as no memory. Where the file system has no such files, its name is
/// taken from it at once.
file_descriptor nameless_file(std::filesystem::path const& store, std::filesystem::path const& dir) {
    for (auto const& folder : {store, dir})
        if (file_descriptor fd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), system_calls::kernel()); fd) return fd;
    auto name = (dir / ".varve-fetched-XXXXXX").string();
    file_descriptor fd(::mkostemp(name.data(), O_CLOEXEC), system_calls::kernel());
    if (fd) ::unlink(name.c_str());
    return fd;
}

/// The same file for reading alone.
file_descriptor read_only(file_descriptor const& fd) {
    file_descriptor out(::open(("/proc/self/fd/" + std::to_string(fd.get())).c_str(), O_RDONLY | O_CLOEXEC), system_calls::kernel());
    if (!out) throw_if(last_system_error(errno), "cannot open the peer's checkpoint");
    return out;
}

}  // namespace

/// The peer's that are newer than the newest here, then what is here, then the peer's others: in this order they are skipped.
std::optional<found_image> core::find_at_either(std::filesystem::path const& path, held_store const* held, wire::fetch const& what) {
    auto here = steps_here(path, held);
    if (what.has_step) std::erase_if(here, [&](auto step) { return step != what.step; });
    auto const newest = here.empty() ? 0 : *std::max_element(here.begin(), here.end());
    auto of_here = [&](std::uint32_t skip) {
        auto asked = what;
        asked.skip = skip;
        return find_here(path, held, asked);
    };
    if (what.has_step && what.skip < here.size()) return of_here(what.skip);

    monitor_sink_options options;
    options.tls = options_.peer_tls;
    client::relay peer(*options_.peer, path.filename().string(), options, true);
    struct registered {
        core& in;
        client::relay& peer;
        registered(core& c, client::relay& p) : in(c), peer(p) {
            std::lock_guard lock(in.mutex_);
            in.asking_.insert(&peer);
            if (in.stopping_) peer.cancel();
        }
        ~registered() {
            std::lock_guard lock(in.mutex_);
            in.asking_.erase(&peer);
        }
    } const known(*this, peer);

    // In memory where there is room: a disk would be written for nothing.
    memory_budget::lease memory;
    std::uint64_t size = 0;
    auto at_peer = [&](std::uint32_t skip, bool wanted, std::uint64_t above) {
        return peer.fetch(what.has_step ? std::optional(what.step) : std::nullopt, skip, [&](wire::image const& about) {
            file_descriptor fd;
            if (!wanted || about.step <= above) return fd;
            size = about.size_bytes;
            auto lease = budget_.take(size);
            if (lease) {
                memory = std::move(*lease);
                fd = {::memfd_create("varve-fetched", MFD_CLOEXEC), system_calls::kernel()};
            } else {
                fd = nameless_file(path, options_.dir);
            }
            if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) throw_if(last_system_error(errno), "no room for the peer's checkpoint");
            return fd;
        });
    };
    auto brought = [&](fetched_checkpoint const& c) {
        return found_image{c.step,           c.sequence, size, false, "the peer at " + options_.peer->text() + ", " + c.name, read_only(c.file),
                           std::move(memory)};
    };
    try {
        std::uint32_t newer = 0;
        for (; !what.has_step; ++newer) {
            auto const found = at_peer(newer, newer == what.skip, newest);
            if (!found || found->step <= newest) break;
            if (newer == what.skip) return brought(*found);
        }
        if (what.skip - newer < here.size()) return of_here(what.skip - newer);
        auto const found = at_peer(what.skip - static_cast<std::uint32_t>(here.size()), true, 0);
        if (!found) return std::nullopt;
        return brought(*found);
    } catch (error const& e) {
        // Training from what is here is better than not at all; with nothing here, it would be from the beginning.
        auto const line =
            varve::detail::printable(path.string()) + ": the peer at " + options_.peer->text() + " cannot be asked for a checkpoint: " + e.what();
        if (what.skip >= here.size())
            throw error(errc::monitor_lost, line + "; there is none here to go on from, so try again, or start over (--fresh)");
        log(line + "; the newest one here serves");
        return of_here(what.skip);
    }
}

}  // namespace varve::asio::server
