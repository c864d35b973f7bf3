#include <boost/test/unit_test.hpp>

#include <chrono>
#include <thread>
#include <vector>

#include "relaying_run.hpp"
#include "support.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;

auto const timed_out = std::make_error_code(std::errc::timed_out);

}  // namespace

BOOST_AUTO_TEST_SUITE(relaying_loans)

BOOST_AUTO_TEST_CASE(what_is_on_loan_is_not_filled_again_until_it_comes_back) {
    auto to = std::make_shared<receiver>();
    to->keeps_loans = true;
    run r({}, 4, varve::async<2>{}, to);
    auto const per_save = (varve::safetensors{}.lay_out(r.model.state()).size_bytes + block - 1) / block;
    BOOST_REQUIRE(per_save == 3u);
    auto first = r.save(1);
    BOOST_REQUIRE(to->was_handed(0));
    BOOST_TEST(to->loans(0) == per_save);
    to->say_crash_safe(0);
    to->say_durable(0);
    BOOST_TEST(!first.durable().wait_for(30s));
    // A durable save's target is gone, but a receiver may keep loans for longer.
    auto second = r.save(2);
    BOOST_REQUIRE(to->was_handed(1));
    auto kept = to->take_loans(1);
    BOOST_TEST(kept.size() == per_save);
    to->say_crash_safe(1);
    to->say_durable(1);
    BOOST_TEST(!second.durable().wait_for(30s));
    // One block is left of four: the third save's first block is staged, and no more.
    r.checkpointer->begin(3);
    auto third = r.checkpointer->seal();
    BOOST_REQUIRE(to->has_loans(2, 1));
    BOOST_TEST(third.staged().wait_for(50ms) == timed_out);
    kept.clear();
    BOOST_TEST(!third.staged().wait_for(30s));
    BOOST_REQUIRE(to->was_handed(2));
    to->say_crash_safe(2);
    to->say_durable(2);
    BOOST_TEST(!third.durable().wait_for(30s));
}

BOOST_AUTO_TEST_CASE(loans_outlive_the_checkpointer_and_its_staging) {
    auto to = std::make_shared<receiver>();
    to->keeps_loans = true;
    std::vector<varve::loan> kept;
    {
        run r({}, 4, varve::async<1>{}, to);
        r.save(1);
        BOOST_REQUIRE(to->was_handed(0));
        kept = to->take_loans(0);
        to->say_crash_safe(0);
        to->say_durable(0);
    }
    BOOST_TEST(kept.size() == 3u);
    kept.clear();
}

BOOST_AUTO_TEST_CASE(drain_waits_until_what_was_handed_over_is_durable) {
    run r;
    auto t = r.save(1);
    BOOST_REQUIRE(r.other->was_handed(0));
    r.other->say_crash_safe(0);
    std::jthread later([&] {
        std::this_thread::sleep_for(30ms);
        r.other->say_durable(0);
    });
    r.checkpointer->drain();
    BOOST_TEST(t.durable().ready());
}

BOOST_AUTO_TEST_CASE(the_destructor_waits_for_its_time_and_cancels_what_is_not_answered) {
    auto options = when(varve::when_busy::block);
    options.drain_on_destroy = 50ms;
    run<varve::async<3>> r(options, 16);
    auto first = r.save(1), second = r.save(2);
    BOOST_REQUIRE(r.other->was_handed(1));
    r.other->say_crash_safe(0);
    BOOST_TEST(!first.crash_safe().wait_for(30s));
    auto const before = std::chrono::steady_clock::now();
    r.checkpointer.reset();
    BOOST_TEST((std::chrono::steady_clock::now() - before >= 50ms));
    BOOST_TEST(first.durable().wait() == errc::cancelled);
    BOOST_TEST(!first.crash_safe().wait());
    BOOST_TEST(second.crash_safe().wait() == errc::cancelled);
    BOOST_TEST(second.durable().wait() == errc::cancelled);
    BOOST_TEST(r.other->gone(0));
    BOOST_TEST(r.other->gone(1));
}

BOOST_AUTO_TEST_CASE(the_destructor_drains_what_is_answered_in_time) {
    run r;
    auto t = r.save(1);
    BOOST_REQUIRE(r.other->was_handed(0));
    std::jthread later([&] {
        r.other->say_crash_safe(0);
        std::this_thread::sleep_for(30ms);
        r.other->say_durable(0);
    });
    r.checkpointer.reset();
    BOOST_TEST(!t.durable().wait());
}

BOOST_AUTO_TEST_SUITE_END()
