#include <boost/test/unit_test.hpp>

#include "varve/conformance/scheduling.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/scheduling/sync.hpp"

namespace {

template <class P>
void expect_lawful(P policy) {
    for (auto const& law : varve::conformance::check_scheduling(policy)) BOOST_ERROR(law);
}

/// What a user might add: training waits for the snapshot and for nothing else.
struct snapshot_then_go {
    static constexpr varve::copy_moment copies = varve::copy_moment::at_seal;
    static constexpr varve::seal_wait waits = varve::seal_wait::staged;
    static constexpr bool needs_fixed_layout = true;
    std::size_t max_in_flight() const { return 2; }
};

/// Claims to copy layers early without needing the layout early.
struct contradiction : snapshot_then_go {
    static constexpr varve::copy_moment copies = varve::copy_moment::at_layer_ready;
    static constexpr bool needs_fixed_layout = false;
};

}  // namespace

BOOST_AUTO_TEST_SUITE(scheduling_conformance)

BOOST_AUTO_TEST_CASE(sync_keeps_the_laws) { expect_lawful(varve::sync{}); }

BOOST_AUTO_TEST_CASE(async_keeps_the_laws) {
    expect_lawful(varve::async<1>{});
    expect_lawful(varve::async<3>{});
    expect_lawful(varve::async<varve::dynamic>(2));
}

BOOST_AUTO_TEST_CASE(layerwise_keeps_the_laws) {
    expect_lawful(varve::layerwise<1>{});
    expect_lawful(varve::layerwise<varve::dynamic>(4));
}

BOOST_AUTO_TEST_CASE(a_users_own_scheduling_keeps_the_laws) { expect_lawful(snapshot_then_go{}); }

BOOST_AUTO_TEST_CASE(the_laws_find_a_contradiction) { BOOST_TEST(varve::conformance::check_scheduling(contradiction{}).size() == 1u); }

BOOST_AUTO_TEST_SUITE_END()
