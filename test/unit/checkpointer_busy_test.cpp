#include <boost/test/unit_test.hpp>

#include <memory>

#include <varve/checkpointer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/staging/host.hpp>

#include "plain_sinks.hpp"
#include "support.hpp"
#include "toy_run.hpp"

namespace {

using namespace varve_test;
using varve::errc;

template <class Scheduling>
using checkpointer = varve::checkpointer<varve::host_staging, Scheduling, plain_file_sink>;

/// A run with two saves in flight at most, whose writes wait for the gate to be opened.
template <varve::when_busy Busy>
struct held_up_run {
    held_up_run() { control->door.close(); }

    temporary_folder dir;
    std::shared_ptr<sink_control> control = std::make_shared<sink_control>();
    toy_model model;
    checkpointer<varve::async<2>> ck{model.state(), {4 * block, block}, {}, plain_file_sink(control), dir.path(), quick_store(), {.busy = Busy}};
};

}  // namespace

BOOST_AUTO_TEST_SUITE(checkpointer_busy)

BOOST_FIXTURE_TEST_CASE(a_busy_checkpointer_skips_when_told_to, held_up_run<varve::when_busy::skip>) {
    BOOST_TEST(ck.max_in_flight() == 2u);
    auto first = train_step(ck, model, 1), second = train_step(ck, model, 2), third = train_step(ck, model, 3);
    BOOST_TEST(second.taken());
    BOOST_TEST(!third.taken());
    BOOST_CHECK(third.durable().wait() == errc::skipped);
    control->door.open();
    BOOST_TEST(!first.durable().wait());
    BOOST_TEST(!second.durable().wait());
    ck.drain();
    BOOST_TEST(ck.files().checkpoints().front().step == 2u);
}

BOOST_FIXTURE_TEST_CASE(the_newest_that_waits_gives_way_when_told_to, held_up_run<varve::when_busy::replace>) {
    auto first = train_step(ck, model, 1), second = train_step(ck, model, 2);
    BOOST_TEST(!second.staged().wait());
    auto third = train_step(ck, model, 3);
    BOOST_TEST_REQUIRE(third.taken());
    BOOST_CHECK(second.durable().wait() == errc::replaced);
    control->door.open();
    BOOST_TEST(!first.durable().wait());
    BOOST_TEST(!third.durable().wait());
    model.update(9);
    BOOST_TEST(ck.restore()->step == 3u);
    BOOST_TEST(model.is_of(3));
}

BOOST_AUTO_TEST_CASE(a_pool_smaller_than_n_images_lowers_n) {
    temporary_folder dir;
    toy_model model(4, floats_per_block);
    checkpointer<varve::async<4>> small(model.state(), {2 * block, block}, {}, plain_file_sink{}, dir.path() / "a", quick_store());
    BOOST_TEST(small.max_in_flight() == 1u);
    checkpointer<varve::async<4>> middle(model.state(), {11 * block, block}, {}, plain_file_sink{}, dir.path() / "b", quick_store());
    BOOST_TEST(middle.max_in_flight() == 2u);
}

BOOST_AUTO_TEST_SUITE_END()
