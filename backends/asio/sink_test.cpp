#include "ring_sinks.hpp"

#include <cerrno>
#include <semaphore>

#include "varve/asio/sink.hpp"

namespace {

/// Runs a test of the faults that all file sinks share, where there is a ring.
template <class Test>
void with_files(Test test) {
    varve_test::with_rings<varve::asio::sink>(test);
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
        target.read(4096, bytes.bytes(),
                    {[](void* to, std::error_code e) noexcept {
                         static_cast<answer*>(to)->error = e;
                         static_cast<answer*>(to)->came.release();
                     },
                     &a});
        a.came.acquire();
        BOOST_TEST(varve_test::is(a.error, EIO));
    });
}

BOOST_AUTO_TEST_CASE(a_thread_that_ends_takes_no_write_with_it) {
    with_files([](auto& f) { f.a_thread_that_ends_takes_no_write_with_it(); });
}

BOOST_AUTO_TEST_CASE(a_refused_ring_is_unsupported_and_says_so) { varve_test::a_refused_ring_is_unsupported_and_says_so<varve::asio::sink>(); }

BOOST_AUTO_TEST_SUITE_END()
