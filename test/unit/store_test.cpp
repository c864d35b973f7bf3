#include <boost/test/unit_test.hpp>

#include <sys/mman.h>
#include <sys/stat.h>
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <varve/checkpointer.hpp>
#include <varve/scheduling/sync.hpp>
#include <varve/staging/host.hpp>
#include <varve/store.hpp>

#include "failing_calls.hpp"
#include "plain_sinks.hpp"
#include "support.hpp"

namespace {

using namespace varve_test;
namespace fs = std::filesystem;
using varve::errc;

constexpr std::size_t block = varve::block_unit_bytes;
using saver = varve::checkpointer<varve::host_staging, varve::sync, plain_file_sink>;

/// Logs every call that changes the disk, and fails those that a test names.
class recording_calls final : public varve::system_calls {
public:
    std::vector<std::string> log;
    std::map<std::string, int> fail;  ///< call -> errno
    std::map<int, std::string> names;
    std::function<void()> before_open;  ///< of the next one

    int openat(int folder, char const* name, int flags, mode_t mode) override {
        if (before_open) std::exchange(before_open, nullptr)();
        int fd = system_calls::openat(folder, name, flags, mode);
        if (fd >= 0) names[fd] = name;
        return fd;
    }
    ssize_t pwrite(int fd, void const* data, std::size_t size, off_t offset) override {
        log.push_back("write " + names[fd]);
        return system_calls::pwrite(fd, data, size, offset);
    }
    int fdatasync(int fd) override { return refused("fdatasync") ? -1 : (log.push_back("fdatasync " + names[fd]), system_calls::fdatasync(fd)); }
    int fsync(int fd) override { return refused("fsync") ? -1 : (log.push_back("fsync " + names[fd]), system_calls::fsync(fd)); }
    int fallocate(int fd, off_t at, off_t size) override { return refused("fallocate") ? -1 : system_calls::fallocate(fd, at, size); }
    int renameat(int folder, char const* from, char const* to) override {
        if (refused("rename")) return -1;
        log.push_back(std::string("rename ") + from + " " + to);
        return system_calls::renameat(folder, from, to);
    }
    int unlinkat(int folder, char const* name) override {
        log.push_back(std::string("unlink ") + name);
        return system_calls::unlinkat(folder, name);
    }
    int setlease(int fd, int lease) override { return refused("lease") ? -1 : system_calls::setlease(fd, lease); }

private:
    bool refused(std::string const& call) {
        auto it = fail.find(call);
        if (it == fail.end()) return false;
        errno = it->second;
        return true;
    }
};

/// Lets somebody act before the store is locked.
class meanwhile_calls final : public varve::system_calls {
public:
    explicit meanwhile_calls(std::function<void()> act) : act_(std::move(act)) {}
    int flock(int fd, int operation) override { return act_(), system_calls::flock(fd, operation); }

private:
    std::function<void()> act_;
};

/// Every other call is interrupted by a signal, of each that may be.
class interrupted_calls final : public varve::system_calls {
public:
    int fdatasync(int fd) override { return interrupted(0) ? -1 : system_calls::fdatasync(fd); }
    int fsync(int fd) override { return interrupted(1) ? -1 : system_calls::fsync(fd); }
    int fallocate(int fd, off_t at, off_t size) override { return interrupted(2) ? -1 : system_calls::fallocate(fd, at, size); }

private:
    bool interrupted(std::size_t call) {
        bool const now = ++calls_[call] % 2 == 1;
        if (now) errno = EINTR;
        return now;
    }
    std::array<std::atomic<int>, 3> calls_{};
};

varve::store_options options_with(varve::system_calls* calls, std::size_t keep = 2, varve::prepare_mode prepare = varve::prepare_mode::none) {
    varve::store_options o;
    o.calls = calls;
    o.keep = keep;
    o.prepare = prepare;
    return o;
}

struct run {
    explicit run(fs::path const& dir, varve::store_options o = options_with(nullptr), varve::system_calls& calls = varve::system_calls::kernel())
        : ck(model.state(), {4 * block, block}, {}, plain_file_sink(std::make_shared<sink_control>(), calls), dir, o) {}

    std::error_code save(std::uint64_t step) {
        model.update(step);
        return ck.save(step).durable().wait();
    }
    toy_model model;
    saver ck;
};

std::vector<std::string> checkpoints_in(fs::path const& dir) {
    std::vector<std::string> names;
    for (auto const& e : fs::directory_iterator(dir))
        if (e.path().filename().string().starts_with("step-")) names.push_back(e.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

std::size_t files_in(fs::path const& dir) { return static_cast<std::size_t>(std::distance(fs::directory_iterator(dir), fs::directory_iterator())); }

std::string name_of(std::uint64_t step) { return varve::detail::checkpoint_name(step, ".safetensors"); }

void flip_bit(fs::path const& file, std::size_t at) {
    std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
    f.seekg(static_cast<std::streamoff>(at));
    char c = static_cast<char>(f.get() ^ 4);
    f.seekp(static_cast<std::streamoff>(at));
    f.put(c);
}

template <class Code>
auto has_code(Code code) {
    return [code](varve::error const& e) { return e.code() == code; };
}

}  // namespace

BOOST_AUTO_TEST_SUITE(store_suite)

BOOST_AUTO_TEST_CASE(it_keeps_the_last_k_and_every_mth_step) {
    temporary_folder dir;
    auto options = options_with(nullptr, 2);
    options.keep_every = 30;
    run r(dir.path(), options);
    for (std::uint64_t step = 10; step <= 100; step += 10) BOOST_TEST(!r.save(step));
    std::vector<std::string> expected{name_of(30), name_of(60), name_of(90), name_of(100)};
    BOOST_TEST(checkpoints_in(dir.path()) == expected, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(n_plus_k_files_hold_everything_and_are_used_again) {
    temporary_folder dir;
    for (auto prepare : {varve::prepare_mode::write, varve::prepare_mode::allocate}) {
        auto at = dir.path() / std::to_string(static_cast<int>(prepare));
        auto options = options_with(nullptr, 2, prepare);
        options.wait_until_prepared = true;
        run r(at, options);
        BOOST_TEST(files_in(at) == 1u + 3u);
        for (std::uint64_t step = 1; step <= 9; ++step) {
            BOOST_TEST(!r.save(step));
            BOOST_TEST(files_in(at) == 1u + 3u);
        }
    }
}

BOOST_AUTO_TEST_CASE(a_commit_takes_its_steps_in_the_order_that_the_format_page_gives) {
    temporary_folder dir;
    recording_calls calls;
    run r(dir.path(), options_with(&calls, 1), calls);
    BOOST_TEST(!r.save(1));
    BOOST_TEST(!r.save(2));
    calls.log.clear();
    BOOST_TEST(!r.save(3));
    auto at = [&](std::string_view prefix, std::size_t from = 0) {
        for (std::size_t i = from; i < calls.log.size(); ++i)
            if (calls.log[i].starts_with(prefix)) return i;
        return calls.log.size();
    };
    auto data = at("write .partial"), sync = at("fdatasync .partial"), rename = at("rename .partial"), folder = at("fsync", rename);
    auto let_go = at("rename " + name_of(2)), folder_again = at("fsync", let_go);
    BOOST_TEST((data < sync && sync < rename && rename < folder && folder < let_go && let_go < folder_again && folder_again < calls.log.size()));
    // The file that was let go is the next to be overwritten, after all of that.
    auto partial = calls.log[let_go].substr(calls.log[let_go].rfind(' ') + 1);
    calls.log.clear();
    BOOST_TEST(!r.save(4));
    BOOST_TEST((at("write " + partial) < calls.log.size()));
}

BOOST_AUTO_TEST_CASE(nothing_is_durable_after_a_failed_sync_and_the_last_good_one_stays) {
    for (std::string call : {"fdatasync", "fsync", "rename"}) {
        temporary_folder dir;
        recording_calls calls;
        {
            run r(dir.path(), options_with(&calls, 1), calls);
            BOOST_TEST(!r.save(1));
            calls.fail[call] = EIO;
            BOOST_TEST((r.save(2) == std::errc::io_error), call);
            BOOST_TEST(fs::exists(dir.path() / name_of(1)), call);
            calls.fail.clear();
            BOOST_TEST(!r.save(3));
        }
        run again(dir.path());
        BOOST_TEST(again.ck.restore()->step == 3u);
        BOOST_TEST(again.model.is_of(3));
    }
}

BOOST_AUTO_TEST_CASE(a_reader_that_maps_a_checkpoint_keeps_its_bytes) {
    temporary_folder dir;
    run r(dir.path(), options_with(nullptr, 1));
    BOOST_TEST(!r.save(1));
    auto size = fs::file_size(dir.path() / name_of(1));
    varve::file_descriptor fd(::open((dir.path() / name_of(1)).c_str(), O_RDONLY), varve::system_calls::kernel());
    auto* map = static_cast<char*>(::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0));
    fd.reset();
    std::vector<char> before(map, map + size);
    for (std::uint64_t step = 2; step <= 6; ++step) BOOST_TEST(!r.save(step));
    BOOST_TEST(std::memcmp(before.data(), map, size) == 0);
    ::munmap(map, size);
}

BOOST_AUTO_TEST_CASE(a_hard_link_keeps_its_bytes) {
    temporary_folder dir, elsewhere;
    run r(dir.path(), options_with(nullptr, 1));
    BOOST_TEST(!r.save(1));
    fs::create_hard_link(dir.path() / name_of(1), elsewhere.path() / "mine.safetensors");
    std::ifstream f(elsewhere.path() / "mine.safetensors", std::ios::binary);
    std::string before((std::istreambuf_iterator<char>(f)), {});
    for (std::uint64_t step = 2; step <= 6; ++step) BOOST_TEST(!r.save(step));
    f.seekg(0);
    BOOST_TEST((std::string((std::istreambuf_iterator<char>(f)), {}) == before));
}

BOOST_AUTO_TEST_CASE(a_symbolic_link_is_let_go_and_its_file_is_not_touched) {
    temporary_folder dir, elsewhere;
    run r(dir.path(), options_with(nullptr, 1));
    BOOST_TEST(!r.save(1));
    auto archived = elsewhere.path() / "archived.safetensors";
    fs::copy_file(dir.path() / name_of(1), archived);
    fs::remove(dir.path() / name_of(1));
    fs::create_symlink(archived, dir.path() / name_of(1));
    std::ifstream f(archived, std::ios::binary);
    std::string before((std::istreambuf_iterator<char>(f)), {});
    for (std::uint64_t step = 2; step <= 5; ++step) BOOST_TEST(!r.save(step));
    f.seekg(0);
    BOOST_TEST((std::string((std::istreambuf_iterator<char>(f)), {}) == before));
}

BOOST_AUTO_TEST_CASE(what_only_looks_like_a_checkpoint_stops_nothing) {
    temporary_folder dir;
    {
        run r(dir.path());
    }
    std::ofstream(dir.path() / "step-000000000001.safetensors.bak") << "copy";
    BOOST_TEST(::mkfifo((dir.path() / name_of(7)).c_str(), 0600) == 0);
    BOOST_TEST(::mkfifo((dir.path() / ".partial-7").c_str(), 0600) == 0);
    run r(dir.path());
    BOOST_TEST(!r.save(8));
    BOOST_TEST(r.ck.restore()->step == 8u);
    BOOST_TEST(fs::exists(dir.path() / "step-000000000001.safetensors.bak"));
}

BOOST_AUTO_TEST_CASE(one_writer_holds_the_lock) {
    temporary_folder dir;
    run r(dir.path());
    BOOST_CHECK_EXCEPTION(run(dir.path()), varve::error, has_code(errc::store_locked));
}

BOOST_AUTO_TEST_CASE(somebody_elses_folder_is_refused_and_untouched) {
    temporary_folder dir;
    std::ofstream(dir.path() / "thesis.txt") << "text";
    BOOST_CHECK_EXCEPTION(run(dir.path()), varve::error, has_code(errc::not_a_store));
    BOOST_TEST(files_in(dir.path()) == 1u);
}

BOOST_AUTO_TEST_CASE(a_mark_that_a_crash_left_empty_is_written_again) {
    temporary_folder dir;
    {
        std::ofstream mark(dir.path() / ".varve");
    }
    {
        run r(dir.path());
    }
    BOOST_TEST(fs::file_size(dir.path() / ".varve") > 0u);
}

BOOST_AUTO_TEST_CASE(a_mark_that_the_disk_has_no_room_for_is_written_again) {
    temporary_folder dir;
    failing_calls calls;
    calls.on_write = [](std::size_t call, std::size_t) -> ssize_t { return call == 0 ? 10 : -ENOSPC; };
    BOOST_CHECK_EXCEPTION(run(dir.path(), options_with(&calls), calls), varve::error, has_code(std::errc::no_space_on_device));
    run r(dir.path());
    BOOST_TEST(!r.save(1));
}

BOOST_AUTO_TEST_CASE(the_mark_is_made_durable_whenever_the_store_opens) {
    temporary_folder dir;
    {
        // Whoever made it may have died before it was.
        run r(dir.path());
    }
    recording_calls calls;
    run r(dir.path(), options_with(&calls), calls);
    auto const& log = calls.log;
    auto const mark = std::find(log.begin(), log.end(), "fsync .varve");
    BOOST_TEST((mark != log.end() && std::find(mark, log.end(), "fsync " + dir.path().string()) != log.end()));
    // And the folder's entry in the one above.
    BOOST_TEST((std::find(mark, log.end(), "fsync " + dir.path().parent_path().string()) != log.end()));
}

BOOST_AUTO_TEST_CASE(a_mark_that_another_writer_wrote_meanwhile_stays_as_it_is) {
    temporary_folder dir;
    std::string const text = R"({"made_by": "another writer, who has a long name", "varve_store": 1, "version": "0.0.1"})";
    meanwhile_calls calls([&] { std::ofstream(dir.path() / ".varve") << text; });
    {
        run r(dir.path(), options_with(&calls), calls);
    }
    std::ifstream f(dir.path() / ".varve");
    BOOST_TEST((std::string((std::istreambuf_iterator<char>(f)), {}) == text));
}

BOOST_AUTO_TEST_CASE(a_mark_of_another_version_is_refused_whatever_its_size) {
    for (std::string const version : {"2", "4294967297", "18446744073709551615", "0", "-1", "-9223372036854775807"}) {
        temporary_folder dir;
        std::ofstream(dir.path() / ".varve") << R"({"varve_store": )" << version << "}";
        BOOST_CHECK_EXCEPTION(run(dir.path()), varve::error, [&](varve::error const& e) {
            return e.code() == errc::not_a_store &&
                   (version[0] == '0' || version[0] == '-' || std::string(e.what()).find(version) != std::string::npos);
        });
    }
}

BOOST_AUTO_TEST_CASE(a_mark_that_is_no_file_keeps_nobody_waiting) {
    temporary_folder dir;
    BOOST_TEST(::mkfifo((dir.path() / ".varve").c_str(), 0600) == 0);
    BOOST_CHECK_EXCEPTION(run(dir.path()), varve::error, has_code(errc::not_a_store));
}

BOOST_AUTO_TEST_CASE(a_maker_whose_name_has_no_room_in_the_mark_is_refused) {
    temporary_folder dir;
    auto options = options_with(nullptr);
    options.made_by = std::string(5000, 'x');
    BOOST_CHECK_EXCEPTION(run(dir.path(), options), varve::error, has_code(std::errc::invalid_argument));
    options.made_by = "\xff";
    {
        run r(dir.path(), options);
        BOOST_TEST(!r.save(1));
    }
    run r(dir.path());
    BOOST_TEST(r.ck.restore()->step == 1u);
}

BOOST_AUTO_TEST_CASE(a_signal_does_not_fail_what_the_store_does) {
    temporary_folder dir;
    interrupted_calls calls;
    for (std::uint64_t step = 1; step <= 3; ++step) {
        run r(dir.path() / "made" / "here", options_with(&calls, 1, varve::prepare_mode::allocate));
        BOOST_TEST(!r.save(step));
    }
}

BOOST_AUTO_TEST_CASE(a_full_disk_shows_when_the_store_opens) {
    temporary_folder dir;
    recording_calls calls;
    calls.fail["fallocate"] = ENOSPC;
    BOOST_CHECK_EXCEPTION(run(dir.path(), options_with(&calls, 2, varve::prepare_mode::allocate), calls), varve::error,
                          has_code(std::errc::no_space_on_device));
    BOOST_TEST(files_in(dir.path()) == 1u);
}

BOOST_AUTO_TEST_CASE(a_disk_that_is_full_before_all_files_are_made_is_left_as_it_was) {
    struct : varve::system_calls {
        int fallocate(int fd, off_t offset, off_t size) override {
            if (++allocated <= 3) return system_calls::fallocate(fd, offset, size);
            errno = ENOSPC;
            return -1;
        }
        int allocated = 0;
    } calls;
    temporary_folder dir;
    {
        run before(dir.path(), options_with(nullptr, 1, varve::prepare_mode::allocate));
    }
    auto const files = files_in(dir.path());
    BOOST_TEST(files == 3u);
    BOOST_CHECK_EXCEPTION(run(dir.path(), options_with(&calls, 9, varve::prepare_mode::allocate), calls), varve::error,
                          has_code(std::errc::no_space_on_device));
    BOOST_TEST(files_in(dir.path()) == files);
}

BOOST_AUTO_TEST_CASE(a_store_that_keeps_everything_does_not_make_all_files_at_the_start) {
    temporary_folder dir;
    recording_calls calls;
    run r(dir.path(), options_with(&calls, 2'000'000'000, varve::prepare_mode::allocate), calls);
    BOOST_TEST(files_in(dir.path()) == 1u + 1024u + 1u);
    for (std::uint64_t step = 1; step <= 3; ++step) BOOST_TEST(!r.save(step));
    BOOST_TEST(r.ck.files().checkpoints().size() == 3u);
}

BOOST_AUTO_TEST_CASE(a_full_disk_later_fails_the_save_and_nothing_else) {
    temporary_folder dir;
    recording_calls calls;
    run r(dir.path(), options_with(&calls, 1, varve::prepare_mode::allocate), calls);
    BOOST_TEST(!r.save(1));
    BOOST_TEST(!r.save(2));
    // With every file of the store in a reader's hands, the next save needs a new one.
    calls.fail["lease"] = EAGAIN;
    calls.fail["fallocate"] = ENOSPC;
    BOOST_TEST(!r.save(3));
    BOOST_TEST((r.save(4) == std::errc::no_space_on_device));
    calls.fail.clear();
    BOOST_TEST(r.ck.restore()->step == 3u);
    BOOST_TEST(!r.save(5));
}

BOOST_AUTO_TEST_CASE(after_a_crash_in_a_commit_a_full_disk_has_room_for_the_next_save) {
    temporary_folder dir;
    {
        run r(dir.path(), options_with(nullptr, 3, varve::prepare_mode::none));
        for (std::uint64_t step = 1; step <= 3; ++step) BOOST_TEST(!r.save(step));
    }
    // One more than K, since the oldest was not let go, and no file for a save.
    for (auto const& e : fs::directory_iterator(dir.path()))
        if (e.path().filename().string().starts_with(".partial-")) fs::remove(e.path());
    recording_calls calls;
    calls.fail["fallocate"] = ENOSPC;
    run r(dir.path(), options_with(&calls, 2, varve::prepare_mode::allocate), calls);
    BOOST_TEST(r.ck.restore(1)->step == 1u);
    BOOST_TEST(!r.save(4));
    BOOST_TEST((checkpoints_in(dir.path()) == std::vector{name_of(3), name_of(4)}));
    BOOST_TEST(!r.save(5));
    BOOST_TEST((checkpoints_in(dir.path()) == std::vector{name_of(4), name_of(5)}));
}

BOOST_AUTO_TEST_CASE(what_is_kept_for_ever_gives_no_save_its_place) {
    temporary_folder dir;
    auto kept = [](varve::system_calls* calls, std::size_t keep, varve::prepare_mode prepare) {
        auto o = options_with(calls, keep, prepare);
        o.keep_every = 10;
        return o;
    };
    {
        run r(dir.path(), kept(nullptr, 3, varve::prepare_mode::none));
        for (std::uint64_t step : {8, 9, 10}) BOOST_TEST(!r.save(step));
    }
    for (auto const& e : fs::directory_iterator(dir.path()))
        if (e.path().filename().string().starts_with(".partial-")) fs::remove(e.path());
    recording_calls calls;
    calls.fail["fallocate"] = ENOSPC;
    // With 8 let go there is a place for 11, and none for 13.
    BOOST_CHECK_EXCEPTION(run(dir.path(), kept(&calls, 2, varve::prepare_mode::allocate), calls), varve::error,
                          has_code(std::errc::no_space_on_device));
    BOOST_TEST((checkpoints_in(dir.path()) == std::vector{name_of(8), name_of(9), name_of(10)}));
}

BOOST_AUTO_TEST_CASE(a_file_that_cannot_be_written_fails_one_save_and_is_not_used_again) {
    struct : varve::system_calls {
        int openat(int folder, char const* name, int flags, mode_t mode) override {
            int const fd = system_calls::openat(folder, name, flags, mode);
            std::lock_guard lock(mutex);
            names[fd] = name;
            return fd;
        }
        ssize_t pwrite(int fd, void const* data, std::size_t size, off_t offset) override {
            std::lock_guard lock(mutex);
            if (names[fd] != bad) return system_calls::pwrite(fd, data, size, offset);
            errno = EIO;
            return -1;
        }
        std::mutex mutex;
        std::map<int, std::string> names;
        std::string bad;
    } calls;
    temporary_folder dir;
    run r(dir.path(), options_with(&calls, 1, varve::prepare_mode::allocate), calls);
    for (std::uint64_t step = 1; step <= 2; ++step) BOOST_TEST(!r.save(step));
    for (auto const& e : fs::directory_iterator(dir.path()))
        if (auto const name = e.path().filename().string(); name.starts_with(".partial-")) calls.bad = name;
    BOOST_TEST_REQUIRE(!calls.bad.empty());
    BOOST_TEST((r.save(3) == std::errc::io_error));
    BOOST_TEST(!fs::exists(dir.path() / calls.bad));
    for (std::uint64_t step = 4; step <= 6; ++step) BOOST_TEST(!r.save(step));
}

BOOST_AUTO_TEST_CASE(the_checkpoint_before_is_taken_when_the_newest_is_broken) {
    temporary_folder dir;
    {
        run r(dir.path());
        BOOST_TEST(!r.save(1));
        BOOST_TEST(!r.save(2));
    }
    flip_bit(dir.path() / name_of(2), varve::digest_chunk_bytes + 100);
    {
        run r(dir.path());
        BOOST_TEST(r.ck.files().broken().size() == 1u);
        BOOST_TEST(r.ck.restore()->step == 1u);
        BOOST_TEST(r.model.is_of(1));
        // The broken one does not count towards K and is not touched.
        BOOST_TEST(!r.save(3));
        BOOST_TEST(fs::exists(dir.path() / name_of(1)));
        BOOST_TEST(fs::exists(dir.path() / name_of(2)));
    }
    flip_bit(dir.path() / name_of(1), varve::digest_chunk_bytes);
    flip_bit(dir.path() / name_of(3), varve::digest_chunk_bytes);
    run r(dir.path());
    BOOST_CHECK_EXCEPTION(r.ck.restore(), varve::error, has_code(errc::no_checkpoint));
}

BOOST_AUTO_TEST_CASE(a_checkpoint_that_breaks_while_the_store_is_open_gives_way_in_restore) {
    temporary_folder dir;
    run r(dir.path());
    BOOST_TEST(!r.save(1));
    BOOST_TEST(!r.save(2));
    flip_bit(dir.path() / name_of(2), varve::digest_chunk_bytes + 7);
    BOOST_TEST(r.ck.restore()->step == 1u);
    BOOST_TEST(r.model.is_of(1));
    BOOST_TEST(r.ck.files().broken().front().name == name_of(2));
}

BOOST_AUTO_TEST_CASE(a_checkpoint_that_is_let_go_while_a_restore_begins_gives_way_to_the_newest) {
    temporary_folder dir;
    recording_calls calls;
    run r(dir.path(), options_with(&calls), calls);
    auto two_more = [&](std::uint64_t step) {
        return [&r, step] {
            BOOST_TEST(!r.save(step));
            BOOST_TEST(!r.save(step + 1));
        };
    };
    two_more(1)();
    calls.before_open = two_more(3);
    BOOST_TEST(r.ck.files().restore(r.model.state(), {}, {})->step == 4u);
    BOOST_TEST(r.model.is_of(4));
    calls.before_open = two_more(5);
    BOOST_CHECK_EXCEPTION(r.ck.files().restore(r.model.state(), 4, {}), varve::error, has_code(errc::no_checkpoint));
    BOOST_TEST(r.ck.files().broken().empty());
    // One that somebody else took away is broken, and the one before it is taken.
    fs::remove(dir.path() / name_of(6));
    BOOST_TEST(r.ck.files().restore(r.model.state(), {}, {})->step == 5u);
    BOOST_TEST(r.ck.files().broken().front().name == name_of(6));
}

BOOST_AUTO_TEST_CASE(a_restore_that_fails_says_whether_tensors_may_have_changed) {
    auto why = [](std::uint64_t broken_at) {
        temporary_folder dir;
        run r(dir.path());
        BOOST_TEST(!r.save(1));
        r.model.update(2);
        flip_bit(dir.path() / name_of(1), broken_at);
        try {
            r.ck.restore();
        } catch (varve::error const& e) {
            BOOST_TEST((e.code() == errc::no_checkpoint));
            return std::pair(std::string(e.what()).find("undefined") != std::string::npos, r.model.is_of(2));
        }
        return std::pair(false, false);
    };
    BOOST_TEST((why(40) == std::pair(false, true)), "the header is broken: no tensor changes");
    BOOST_TEST(why(varve::digest_chunk_bytes + 100).first, "the data is broken");

    temporary_folder dir;
    run r(dir.path());
    BOOST_TEST(!r.save(1));
    r.model.state().restored = [] { throw varve::error(errc::malformed, "not a state of this generator"); };
    BOOST_CHECK_EXCEPTION(r.ck.restore(), varve::error, [](auto const& e) { return std::string(e.what()).find("undefined") != std::string::npos; });
}

BOOST_AUTO_TEST_CASE(a_device_that_fails_makes_no_checkpoint_a_broken_one) {
    struct device_errors : std::error_category {
        char const* name() const noexcept override { return "device"; }
        std::string message(int) const override { return "an illegal address"; }
    };
    static device_errors const category;
    temporary_folder dir;
    run r(dir.path());
    BOOST_TEST(!r.save(1));
    auto const broken = std::error_code(700, category);
    r.model.state().restored = [&] { throw varve::error(broken); };
    BOOST_CHECK_EXCEPTION(r.ck.restore(), varve::error, [&](auto const& e) { return e.code() == broken; });
    r.model.state().restored = nullptr;
    BOOST_TEST(r.ck.restore()->step == 1u);
}

BOOST_AUTO_TEST_CASE(a_store_with_checkpoints_is_not_started_over_by_accident) {
    temporary_folder dir;
    {
        run r(dir.path());
        BOOST_TEST(!r.save(7));
    }
    auto options = options_with(nullptr);
    options.fresh = true;
    BOOST_CHECK_EXCEPTION(run(dir.path(), options), varve::error, has_code(errc::mismatch));
    options.overwrite = true;
    {
        run r(dir.path(), options);
        BOOST_TEST(!r.ck.restore().has_value());
    }
    // Nothing was committed, so nothing was let go.
    run r(dir.path());
    BOOST_TEST(r.ck.restore()->step == 7u);
}

BOOST_AUTO_TEST_CASE(partial_files_of_a_dead_writer_are_taken_over) {
    temporary_folder dir;
    {
        run r(dir.path(), options_with(nullptr, 2, varve::prepare_mode::allocate));
        BOOST_TEST(!r.save(1));
    }
    std::ofstream(dir.path() / ".partial-99") << "torn";
    run r(dir.path(), options_with(nullptr, 2, varve::prepare_mode::allocate));
    BOOST_TEST(!fs::exists(dir.path() / ".partial-99"));
    BOOST_TEST(files_in(dir.path()) == 1u + 3u);
}

BOOST_AUTO_TEST_CASE(saves_leak_no_descriptor) {
    temporary_folder dir;
    run r(dir.path());
    BOOST_TEST(!r.save(1));
    auto before = files_in("/proc/self/fd");
    for (std::uint64_t step = 2; step < 60; ++step) BOOST_TEST(!r.save(step));
    BOOST_TEST(files_in("/proc/self/fd") == before);
}

BOOST_AUTO_TEST_SUITE_END()
