#include "bench_store.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "varve/detail/store_folder.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"
#include "varve/store.hpp"
#include "varve/system.hpp"

namespace varve::tool {

namespace {

file_descriptor open_folder(std::filesystem::path const& dir) {
    return {::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel()};
}

constexpr std::string_view bench_name = "varve bench", train_name = "varve train";
static_assert(bench_name.size() == train_name.size());

bool is_ours(file_descriptor const& folder, std::filesystem::path const& dir) {
    auto const mark = folder ? detail::read_mark(folder.get(), dir) : std::nullopt;
    return mark && mark->made_by == bench_name;
}

/// The store's mark, locked as its writer locks it; not open where there is none. Who has just ended, a monitor say, has a moment to
/// let go; throws errc::store_locked where somebody goes on writing.
file_descriptor locked_mark(file_descriptor const& folder, std::filesystem::path const& dir) {
    file_descriptor mark(::openat(folder.get(), detail::mark_name.data(), O_RDWR | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    for (int tries = 0; mark && ::flock(mark.get(), LOCK_EX | LOCK_NB) != 0; ++tries, std::this_thread::sleep_for(std::chrono::milliseconds(20)))
        if (tries == 100)
            throw error(errc::store_locked,
                        "'" + dir.string() + "': another process is writing to this store; wait for it or give another --checkpoint-dir");
    return mark;
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
    auto const folder = open_folder(dir);
    if (!folder) throw_if(last_system_error(errno), "cannot open the checkpoint folder " + detail::printable(dir.string()));
    auto const names = detail::names_in(folder.get());
    if (names.empty()) return;
    auto refuse = [&](std::string const& holds) {
        throw error(errc::not_a_store,
                    "'" + dir.string() + "' holds " + holds + " that varve bench did not write; empty it or give another --checkpoint-dir");
    };
    if (!is_ours(folder, dir)) refuse("files");
    for (auto const& name : names)
        if (name != detail::mark_name && !detail::is_checkpoint_name(name) && !name.starts_with(detail::partial_prefix)) refuse("'" + name + "'");
    remove_bench_store(dir);
    make_writable_folder(dir, "checkpoint folder");
}

void remove_bench_store(std::filesystem::path const& dir) {
    auto const folder = open_folder(dir);
    if (!folder) return;
    auto const lock = locked_mark(folder, dir);
    // A store is flat. The mark goes last, so that a run that is killed here leaves a folder that still says whose it is.
    for (auto const& name : detail::names_in(folder.get()))
        if (name != detail::mark_name) ::unlinkat(folder.get(), name.c_str(), 0);
    ::unlinkat(folder.get(), detail::mark_name.data(), 0);
    std::error_code code;
    std::filesystem::remove(dir, code);
}

void take_over_bench_store(std::filesystem::path const& dir) {
    auto const folder = open_folder(dir);
    if (!is_ours(folder, dir)) return;
    file_descriptor const mark(::openat(folder.get(), detail::mark_name.data(), O_RDWR | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    std::string text(detail::most_mark_bytes, '\0');
    auto const size = ::pread(mark.get(), text.data(), text.size(), 0);
    auto const at = std::string_view(text).substr(0, size > 0 ? static_cast<std::size_t>(size) : 0).find(bench_name);
    // As long as the one before, and within a sector: the mark is whole at every moment.
    errno = 0;
    if (at == std::string_view::npos ||
        ::pwrite(mark.get(), train_name.data(), train_name.size(), static_cast<off_t>(at)) != static_cast<ssize_t>(train_name.size()) ||
        ::fsync(mark.get()) != 0)
        throw error(errno != 0 ? last_system_error(errno) : make_error_code(errc::not_a_store),
                    "'" + dir.string() + "': cannot take the store over from varve bench; give another folder");
}

void settle_disk(std::filesystem::path const& dir) {
    if (auto const folder = open_folder(dir)) ::syncfs(folder.get());
}

}  // namespace varve::tool
