#pragma once

#include "failing_calls.hpp"
#include "scratch_folder.hpp"

#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <semaphore>
#include <system_error>
#include <thread>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/error.hpp"

namespace varve_test {

inline varve::detail::aligned_bytes some_bytes(std::size_t size) {
    varve::detail::aligned_bytes bytes(size);
    unsigned x = 7;
    for (auto& b : bytes.bytes()) b = static_cast<std::byte>((x = x * 1664525u + 1013904223u) >> 24);
    return bytes;
}

/// Writes and waits; the answer must come once.
template <varve::target Target>
std::error_code write_and_wait(Target& target, std::uint64_t offset, std::span<std::byte const> bytes, int slot = varve::unregistered) {
    struct answer {
        std::binary_semaphore came{0};
        std::atomic<int> times{0};
        std::error_code error{};
    } a;
    target.write(offset, {bytes.data(), bytes.size(), varve::memory_kind::host, slot},
                 {[](void* context, std::error_code error) noexcept {
                      auto& to = *static_cast<answer*>(context);
                      to.error = error;
                      if (to.times++ == 0) to.came.release();
                  },
                  &a});
    a.came.acquire();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    BOOST_TEST(a.times == 1);
    return a.error;
}

inline bool is(std::error_code error, int value) { return error == std::error_code(value, std::system_category()); }

inline std::size_t open_descriptors() {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator()));
}

inline bool holds(scratch_folder const& folder, varve::detail::aligned_bytes const& bytes) {
    auto content = folder.content(0);
    return std::equal(content.begin(), content.end(), bytes.data(), bytes.data() + bytes.size());
}

/// What every sink that writes files does when the system fails it. `make(system_calls&)` yields a sink.
template <class Make>
class sink_faults {
public:
    explicit sink_faults(Make make) : make_(make) {}

    void torn_writes_are_resumed() {
        for (std::size_t torn_to : {std::size_t{1}, std::size_t{4095}, std::size_t{4096}, std::size_t{5000}, std::size_t{1} << 20}) {
            scratch_folder folder;
            failing_calls calls;
            // Most calls are torn: 4 MB in pieces of a byte would take for ever.
            calls.on_write = [&](std::size_t n, std::size_t size) { return static_cast<ssize_t>(n < 40 ? std::min(size, torn_to) : size); };
            auto bytes = some_bytes((4u << 20) + 123);
            auto sink = make_(calls);
            auto target = sink.open(folder.request(0, bytes.size()));
            BOOST_TEST(!write_and_wait(target, 0, bytes.bytes()));
            BOOST_TEST(!target.sync());
            BOOST_TEST(holds(folder, bytes), "torn to " << torn_to);
            BOOST_TEST(calls.writes > 1u);
        }
    }

    void interrupted_writes_are_repeated() {
        scratch_folder folder;
        failing_calls calls;
        calls.on_write = [](std::size_t n, std::size_t size) { return n % 3 != 2 ? (n % 3 == 0 ? -EINTR : -EAGAIN) : static_cast<ssize_t>(size); };
        calls.on_sync = [](int n) { return n == 0 ? EINTR : 0; };
        auto bytes = some_bytes((3u << 20) + 1);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(!write_and_wait(target, 0, bytes.bytes()));
        BOOST_TEST(!target.sync());
        BOOST_TEST(holds(folder, bytes));
    }

    void a_failed_write_says_why_and_harms_no_other() {
        for (int why : {EIO, ENOSPC, EDQUOT}) {
            scratch_folder folder;
            failing_calls calls;
            std::atomic<bool> broken = true;
            calls.on_write = [&](std::size_t n, std::size_t size) {
                return broken && n == 1 ? -static_cast<ssize_t>(why) : static_cast<ssize_t>(size);
            };
            auto bytes = some_bytes((2u << 20) + 9);
            auto sink = make_(calls);
            auto target = sink.open(folder.request(0, bytes.size()));
            // Two pieces at least: the first goes well.
            BOOST_TEST(is(write_and_wait(target, 0, bytes.bytes()), why));
            broken = false;
            BOOST_TEST(!write_and_wait(target, 0, bytes.bytes()));
            BOOST_TEST(!target.sync());
            BOOST_TEST(holds(folder, bytes));
        }
    }

    void a_failed_sync_fails_for_ever() {
        scratch_folder folder;
        failing_calls calls;
        calls.on_sync = [](int n) { return n == 0 ? EIO : 0; };
        auto bytes = some_bytes(1u << 20);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(!write_and_wait(target, 0, bytes.bytes()));
        BOOST_TEST(is(target.sync(), EIO));
        BOOST_TEST(is(target.sync(), EIO));
        auto moved = std::move(target);
        BOOST_TEST(is(moved.sync(), EIO));
        auto again = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(!again.sync());
    }

    void without_o_direct_it_writes_buffered_and_says_so() {
        scratch_folder folder;
        failing_calls calls;
        calls.on_open = [](int flags) { return (flags & O_DIRECT) != 0 ? EINVAL : 0; };
        auto bytes = some_bytes((2u << 20) + 77);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(!write_and_wait(target, 0, bytes.bytes()));
        BOOST_TEST(!target.sync());
        BOOST_TEST(holds(folder, bytes));
        BOOST_TEST(sink.describe().find("no O_DIRECT") != std::string::npos);
    }

    void direct_writes_that_are_refused_go_buffered() {
        scratch_folder folder;
        failing_calls calls;
        calls.on_write = [](std::size_t n, std::size_t size) { return n == 0 ? -EINVAL : static_cast<ssize_t>(size); };
        auto bytes = some_bytes(1u << 20);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(!write_and_wait(target, 0, bytes.bytes()));
        BOOST_TEST(holds(folder, bytes));
    }

    void unaligned_blocks_are_written_all_the_same() {
        scratch_folder folder;
        failing_calls calls;
        auto bytes = some_bytes(300'001);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        for (std::size_t at = 0; at < bytes.size(); at += 77'777) {
            auto n = std::min<std::size_t>(77'777, bytes.size() - at);
            BOOST_TEST(!write_and_wait(target, at, bytes.bytes().subspan(at, n)));
        }
        BOOST_TEST(!target.sync());
        BOOST_TEST(holds(folder, bytes));
    }

    void an_open_that_fails_says_what_where_and_what_to_do() {
        scratch_folder folder;
        failing_calls calls;
        auto sink = make_(calls);
        auto before = open_descriptors();
        auto expect = [&](varve::open_request const& r, int code, char const* words) {
            try {
                sink.open(r);
                BOOST_ERROR("it opens");
            } catch (varve::error const& e) {
                std::string line = e.what();
                BOOST_TEST(e.code().value() == code);
                BOOST_TEST(line.find(r.name) != std::string::npos, line);
                BOOST_TEST(line.find(words) != std::string::npos, line);
                BOOST_TEST(line.find('\n') == std::string::npos);
            }
        };
        expect({folder.descriptor(), "no/such", 1u << 20}, ENOENT, "check the folder");
        std::filesystem::create_directory(folder.path() / "folder");
        expect({folder.descriptor(), "folder", 1u << 20}, EISDIR, "cannot open");
        calls.truncate_error = ENOSPC;
        expect(folder.request(0, 1u << 20), ENOSPC, "check the free space");
        calls.truncate_error = 0;
        calls.on_open = [](int flags) { return (flags & O_DIRECT) != 0 ? EMFILE : 0; };
        expect(folder.request(0, 1u << 20), EMFILE, "ulimit -n");
        BOOST_TEST(open_descriptors() == before);
        BOOST_TEST(calls.opened == calls.closed);
    }

    void a_thousand_opens_leave_no_descriptor() {
        scratch_folder folder;
        failing_calls calls;
        auto whole = open_descriptors();
        {
            auto sink = make_(calls);
            auto before = open_descriptors();
            for (int i = 0; i < 1000; ++i) {
                auto target = sink.open(folder.request(i % 2, 1u << 20));
            }
            BOOST_TEST(open_descriptors() == before);
            BOOST_TEST(calls.opened == calls.closed);
        }
        BOOST_TEST(open_descriptors() == whole);
    }

    void many_threads_write_many_blocks() {
        scratch_folder folder;
        failing_calls calls;
        constexpr std::size_t block = 64u << 10, count = 256;
        auto bytes = some_bytes(block * count + 17);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        std::atomic<std::size_t> came{0}, failed{0}, next{0};
        struct context {
            std::atomic<std::size_t>*came, *failed;
        } c{&came, &failed};
        {
            std::vector<std::jthread> threads;
            for (int t = 0; t < 8; ++t)
                threads.emplace_back([&] {
                    for (std::size_t i; (i = next++) <= count;) {
                        auto part = bytes.bytes().subspan(i * block, std::min(block, bytes.size() - i * block));
                        target.write(i * block, {part.data(), part.size(), varve::memory_kind::host, varve::unregistered},
                                     {[](void* to, std::error_code e) noexcept {
                                          auto& x = *static_cast<context*>(to);
                                          if (e) ++*x.failed;
                                          ++*x.came;
                                      },
                                      &c});
                    }
                });
        }
        // Without a limit: writes under way use what is on this stack.
        while (came <= count) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        BOOST_TEST(came == count + 1);
        BOOST_TEST(failed == 0u);
        BOOST_TEST(!target.sync());
        BOOST_TEST(holds(folder, bytes));
    }

    void a_thread_that_ends_takes_no_write_with_it() {
        scratch_folder folder;
        failing_calls calls;
        auto bytes = some_bytes(16u << 20);
        auto sink = make_(calls);
        auto target = sink.open(folder.request(0, bytes.size()));
        struct answer {
            std::binary_semaphore came{0};
            std::error_code error{};
        } a;
        std::thread([&] {
            target.write(0, {bytes.data(), bytes.size()},
                         {[](void* to, std::error_code e) noexcept {
                              static_cast<answer*>(to)->error = e;
                              static_cast<answer*>(to)->came.release();
                          },
                          &a});
        }).join();
        a.came.acquire();
        BOOST_TEST(!a.error);
        BOOST_TEST(holds(folder, bytes));
    }

private:
    Make make_;
};

}  // namespace varve_test
