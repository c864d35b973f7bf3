#include "sink_faults.hpp"
#include "support.hpp"

#include "varve/posix/sink.hpp"

namespace {

auto faults() {
    return varve_test::sink_faults([](varve::system_calls& calls) { return varve::posix::sink({.calls = &calls}); });
}

}  // namespace

BOOST_AUTO_TEST_SUITE(posix_sink)

BOOST_AUTO_TEST_CASE(torn_writes_are_resumed) { faults().torn_writes_are_resumed(); }
BOOST_AUTO_TEST_CASE(interrupted_writes_are_repeated) { faults().interrupted_writes_are_repeated(); }
BOOST_AUTO_TEST_CASE(a_failed_write_says_why_and_harms_no_other) { faults().a_failed_write_says_why_and_harms_no_other(); }
BOOST_AUTO_TEST_CASE(a_failed_sync_fails_for_ever) { faults().a_failed_sync_fails_for_ever(); }
BOOST_AUTO_TEST_CASE(without_o_direct_it_writes_buffered_and_says_so) { faults().without_o_direct_it_writes_buffered_and_says_so(); }
BOOST_AUTO_TEST_CASE(direct_writes_that_are_refused_go_buffered) { faults().direct_writes_that_are_refused_go_buffered(); }
BOOST_AUTO_TEST_CASE(unaligned_blocks_are_written_all_the_same) { faults().unaligned_blocks_are_written_all_the_same(); }
BOOST_AUTO_TEST_CASE(an_open_that_fails_says_what_where_and_what_to_do) { faults().an_open_that_fails_says_what_where_and_what_to_do(); }
BOOST_AUTO_TEST_CASE(a_thousand_opens_leave_no_descriptor) { faults().a_thousand_opens_leave_no_descriptor(); }
BOOST_AUTO_TEST_CASE(many_threads_write_many_blocks) { faults().many_threads_write_many_blocks(); }

BOOST_AUTO_TEST_CASE(small_buffered_writes_end_inside_the_call) {
    varve_test::scratch_folder folder;
    varve::posix::sink sink({.direct = varve::posix::direct_io::never});
    auto target = sink.open(folder.request(0, 0));
    auto here = std::this_thread::get_id();
    std::thread::id there;
    std::byte byte{1};
    target.write(0, {&byte, 1},
                 {[](void* to, std::error_code) noexcept { *static_cast<std::thread::id*>(to) = std::this_thread::get_id(); }, &there});
    BOOST_TEST((here == there));
}

BOOST_AUTO_TEST_CASE(a_smaller_image_cuts_the_file_and_content_within_the_size_stays) {
    varve_test::scratch_folder folder;
    varve::posix::sink sink;
    auto bytes = varve_test::some_bytes(100'000);
    {
        auto target = sink.open(folder.request(0, bytes.size()));
        BOOST_TEST(!varve_test::write_and_wait(target, 0, bytes.bytes()));
    }
    {
        auto target = sink.open(folder.request(0, bytes.size()));
    }
    BOOST_TEST(varve_test::holds(folder, bytes));
    {
        auto target = sink.open(folder.request(0, 50'000));
    }
    BOOST_TEST(folder.content(0).size() == 50'000u);
    {
        auto target = sink.open(folder.request(0, 0));
    }
    BOOST_TEST(folder.content(0).empty());
}

BOOST_AUTO_TEST_SUITE_END()
