#include "bench_store.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <cerrno>

#include "varve/error.hpp"
#include "varve/store.hpp"
#include "varve/system.hpp"

namespace varve::tool {

namespace {

file_descriptor open_folder(std::filesystem::path const& dir) {
    return {::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel()};
}

bool is_ours(std::filesystem::path const& dir) {
    auto const folder = open_folder(dir);
    if (!folder) return false;
    auto const mark = detail::read_mark(folder.get(), dir);
    return mark && mark->made_by == "varve bench";
}

}  // namespace

void make_writable_folder(std::filesystem::path const& dir, char const* what) {
    std::error_code code;
    std::filesystem::create_directories(dir, code);
    auto refuse = [&](std::error_code why) {
        throw error(why, "cannot write to the " + std::string(what) + " '" + dir.string() + "': " + why.message() +
                             "; check its permissions or give another");
    };
    if (code) refuse(code);
    if (::access(dir.c_str(), W_OK | X_OK) != 0) refuse(last_system_error(errno));
}

void prepare_bench_store(std::filesystem::path const& dir) {
    make_writable_folder(dir, "checkpoint folder");
    if (std::filesystem::is_empty(dir)) return;
    if (!is_ours(dir))
        throw error(errc::not_a_store,
                    "'" + dir.string() + "' holds files that varve bench did not write; empty it or give another --checkpoint-dir");
    remove_bench_store(dir);
    make_writable_folder(dir, "checkpoint folder");
}

void remove_bench_store(std::filesystem::path const& dir) {
    // A store is flat. The mark goes last, so that a run that is killed here leaves a folder that still says whose it is.
    std::error_code code;
    for (auto const& entry : std::filesystem::directory_iterator(dir, code))
        if (entry.path().filename() != detail::mark_name) std::filesystem::remove(entry.path(), code);
    std::filesystem::remove(dir / detail::mark_name, code);
    std::filesystem::remove(dir, code);
}

void settle_disk(std::filesystem::path const& dir) {
    if (auto const folder = open_folder(dir)) ::syncfs(folder.get());
}

}  // namespace varve::tool
