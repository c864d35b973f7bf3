#include "refused_rings.hpp"
#include "sink_faults.hpp"
#include "support.hpp"

#include <cerrno>
#include <semaphore>
#include <string>
#include <thread>

#include "varve/asio/sink.hpp"

namespace {

auto make = [](varve::system_calls& calls) { return varve::asio::sink({.calls = &calls}); };

/// Runs a test of the faults that all file sinks share, where Asio has files at all.
template <class Test>
void with_files(Test test) {
    if (auto refused = varve::asio::sink::available()) return varve_test::skip("no io_uring: " + refused.message());
    varve_test::sink_faults faults(make);
    test(faults);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(asio_sink)

BOOST_AUTO_TEST_CASE(torn_writes_are_resumed) {
    with_files([](auto& f) { f.torn_writes_are_resumed(); });
}
BOOST_AUTO_TEST_CASE(interrupted_writes_are_repeated) {
    with_files([](auto& f) { f.interrupted_writes_are_repeated(); });
}
BOOST_AUTO_TEST_CASE(a_failed_write_says_why_and_harms_no_other) {
    with_files([](auto& f) { f.a_failed_write_says_why_and_harms_no_other(); });
}
BOOST_AUTO_TEST_CASE(a_failed_sync_fails_for_ever) {
    with_files([](auto& f) { f.a_failed_sync_fails_for_ever(); });
}
BOOST_AUTO_TEST_CASE(without_o_direct_it_writes_buffered_and_says_so) {
    with_files([](auto& f) { f.without_o_direct_it_writes_buffered_and_says_so(); });
}
BOOST_AUTO_TEST_CASE(unaligned_blocks_are_written_all_the_same) {
    with_files([](auto& f) { f.unaligned_blocks_are_written_all_the_same(); });
}
BOOST_AUTO_TEST_CASE(an_open_that_fails_says_what_where_and_what_to_do) {
    with_files([](auto& f) { f.an_open_that_fails_says_what_where_and_what_to_do(); });
}
BOOST_AUTO_TEST_CASE(a_thousand_opens_leave_no_descriptor) {
    with_files([](auto& f) { f.a_thousand_opens_leave_no_descriptor(); });
}
BOOST_AUTO_TEST_CASE(many_threads_write_many_blocks) {
    with_files([](auto& f) { f.many_threads_write_many_blocks(); });
}

BOOST_AUTO_TEST_CASE(a_write_that_the_kernel_refuses_says_why) {
    with_files([](auto&) {
        // No seam in between: Asio's own way of saying what went wrong.
        varve_test::scratch_folder folder;
        auto bytes = varve_test::some_bytes(1u << 20);
        varve::asio::sink sink;
        auto target = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(varve_test::is(varve_test::write_and_wait(target, 0, {static_cast<std::byte*>(nullptr) + 4096, 4096}), EFAULT));
        BOOST_TEST(!varve_test::write_and_wait(target, 0, bytes.bytes()));
        BOOST_TEST(varve_test::holds(folder, bytes));
    });
}

BOOST_AUTO_TEST_CASE(a_read_behind_the_end_is_an_error) {
    with_files([](auto&) {
        varve_test::scratch_folder folder;
        auto bytes = varve_test::some_bytes(8192);
        varve::asio::sink sink;
        auto target = sink.open(folder.request(0, bytes.size()));
        struct answer {
            std::binary_semaphore came{0};
            std::error_code error{};
        } a;
        target.read(4096, bytes.bytes(), {[](void* to, std::error_code e) noexcept {
                                              static_cast<answer*>(to)->error = e;
                                              static_cast<answer*>(to)->came.release();
                                          },
                                          &a});
        a.came.acquire();
        BOOST_TEST(varve_test::is(a.error, EIO));
    });
}

BOOST_AUTO_TEST_CASE(a_thread_that_ends_takes_no_write_with_it) {
    with_files([](auto&) {
        varve_test::scratch_folder folder;
        auto bytes = varve_test::some_bytes(16u << 20);
        varve::asio::sink sink;
        auto target = sink.open(folder.request(0, bytes.size()));
        struct answer {
            std::binary_semaphore came{0};
            std::error_code error{};
        } a;
        std::thread([&] {
            target.write(0, {bytes.data(), bytes.size()}, {[](void* to, std::error_code e) noexcept {
                                                               static_cast<answer*>(to)->error = e;
                                                               static_cast<answer*>(to)->came.release();
                                                           },
                                                           &a});
        }).join();
        a.came.acquire();
        BOOST_TEST(!a.error);
        BOOST_TEST(varve_test::holds(folder, bytes));
    });
}

BOOST_AUTO_TEST_CASE(a_refused_ring_is_unsupported_and_says_so) {
    if (auto refused = varve::asio::sink::available()) return varve_test::skip("no io_uring: " + refused.message());
    for (int why : {EPERM, ENOSYS}) {
        int status = varve_test::in_a_child([why] {
            auto before = varve_test::open_descriptors();
            if (!varve_test::refuse_rings(why)) return 77;
            if (!varve_test::is(varve::asio::sink::available(), why)) return 1;
            try {
                varve::asio::sink sink;
                return 2;
            } catch (varve::error const& e) {
                if (e.code() != varve::errc::unsupported || std::string(e.what()).find("use the posix sink") == std::string::npos) return 3;
            }
            return varve_test::open_descriptors() == before ? 0 : 4;
        });
        if (status == 77) return varve_test::skip("no seccomp filters here");
        BOOST_TEST(status == 0);
    }
}

BOOST_AUTO_TEST_SUITE_END()
