#include "store_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <algorithm>
#include <cerrno>

#include "varve/detail/broken_file.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"

namespace varve::tool {

std::vector<std::filesystem::path> checkpoint_paths(std::filesystem::path const& folder) {
    auto const shown = detail::printable(folder.string());
    file_descriptor fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel());
    if (!fd) throw_if(last_system_error(errno), shown);
    auto mark = detail::read_mark(fd.get(), shown);
    std::vector<std::filesystem::path> out;
    for (auto const& name : detail::names_in(fd.get()))
        if (detail::step_of_name(name, ".safetensors") || detail::step_of_name(name, ".pt")) out.push_back(folder / name);
    if (!mark && out.empty()) throw error(errc::not_a_store, shown + ": not a checkpoint store; give the folder that holds the checkpoints");
    std::sort(out.begin(), out.end());
    return out;
}

listed_store list_store(std::filesystem::path const& folder) {
    listed_store out;
    for (auto const& path : checkpoint_paths(folder)) {
        try {
            auto fd = open_to_read(path);
            auto identity = format_of(fd.get())->identify(fd.get());
            struct stat info{};
            ::fstat(fd.get(), &info);
            out.checkpoints.push_back({path, identity.step, identity.sequence, static_cast<std::uint64_t>(info.st_size)});
        } catch (error const& e) {
            if (e.code() == errc::unsupported) throw error(e.code(), detail::printable(path.string()) + ": " + e.what());
            bool const absent = e.code() == std::errc::no_such_file_or_directory;  // a link to nothing, or let go
            if (!was_let_go(e, path)) out.broken.push_back({path, e.what(), !absent && detail::tells_of_the_file(e.code())});
        }
    }
    std::stable_sort(out.checkpoints.begin(), out.checkpoints.end(), [](auto const& a, auto const& b) { return a.sequence > b.sequence; });
    return out;
}

void expect_all_read(listed_store const& listed, std::optional<std::uint64_t> step) {
    for (auto const& b : listed.broken) {
        auto const name = b.path.filename().string();
        auto const named = detail::step_of_name(name, b.path.extension().string());
        if (!b.was_read && (!step || named == step))
            throw error(errc::no_checkpoint, detail::printable(b.path.string()) + ": cannot be read, and may be the newest: " + b.why +
                                                 "; see to it, or name the checkpoint to take");
    }
}

bool was_let_go(error const& why, std::filesystem::path const& path) {
    return why.code() == std::errc::no_such_file_or_directory && !std::filesystem::exists(std::filesystem::symlink_status(path));
}

std::unique_ptr<checkpoint_file> open_newest(std::filesystem::path const& path) {
    if (!std::filesystem::is_directory(path)) return open_checkpoint(path);
    for (;;) {
        auto const listed = list_store(path);
        expect_all_read(listed);
        if (listed.checkpoints.empty()) {
            std::string why = "no whole checkpoint";
            if (!listed.broken.empty()) why += "; " + listed.broken.back().path.filename().string() + ": " + listed.broken.back().why;
            throw error(errc::no_checkpoint, detail::printable(path.string()) + ": " + why);
        }
        auto const& newest = listed.checkpoints.front().path;
        try {
            return open_checkpoint(newest);
        } catch (error const& e) {
            if (!was_let_go(e, newest)) throw;
        }
    }
}

}  // namespace varve::tool
