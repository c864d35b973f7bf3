#include <boost/test/unit_test.hpp>

#include <chrono>

#include "support.hpp"
#include "transport/silence.hpp"

namespace {

using namespace std::chrono_literals;
using varve::asio::silence;

silence::clock::time_point const start{100s};

}  // namespace

BOOST_AUTO_TEST_SUITE(asio_silence)

BOOST_AUTO_TEST_CASE(a_silence_lasts_from_what_was_heard_last) {
    silence s(start);
    BOOST_TEST((s.lasted(start + 4s, 4s) == 4s));
    BOOST_TEST((s.lasted(start + 8s, 4s) == 8s));
    s.broken(start + 9s);
    BOOST_TEST((s.lasted(start + 12s, 4s) == 3s));
    BOOST_TEST((s.lasted(start + 16s, 4s) == 7s));
}

BOOST_AUTO_TEST_CASE(a_stop_of_this_process_is_no_silence_of_the_peers) {
    silence s(start);
    BOOST_TEST((s.lasted(start + 4s, 4s) == 4s));
    // An hour in a debugger.
    BOOST_TEST((s.lasted(start + 3604s, 4s) == 12s));
    s.broken(start + 3604s);
    BOOST_TEST((s.lasted(start + 3608s, 4s) == 4s));
}

BOOST_AUTO_TEST_CASE(who_is_asked_late_by_less_than_a_period_counts_all_of_it) {
    silence s(start);
    BOOST_TEST((s.lasted(start + 7s, 4s) == 7s));
    BOOST_TEST((s.lasted(start + 7s, 4s) == 7s));
}

BOOST_AUTO_TEST_SUITE_END()
