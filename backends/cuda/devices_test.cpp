#include <boost/test/unit_test.hpp>

#include "two_gpus.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"

namespace {

using namespace varve_test;
using varve::cuda::pinned_staging;
constexpr std::size_t block = varve::block_unit_bytes;

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling, std::size_t pool_blocks, std::size_t snapshots) {
    varve_test::never_mixes_steps_of_two(pinned_staging(pool_blocks * block, block, {.snapshots = snapshots}), scheduling);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_devices)

BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_state_on_two_gpus_mixes_steps) {
    if (!have_two_gpus()) return;
    for (std::size_t pool_blocks : {2, 64}) {
        never_mixes_steps(varve::async<3>{}, pool_blocks, 0);
        never_mixes_steps(varve::layerwise<3>{}, pool_blocks, 0);
        // There is no snapshot of such a state, and saves go on without.
        never_mixes_steps(varve::layerwise<2>{}, pool_blocks, 2);
    }
}

BOOST_AUTO_TEST_CASE(where_a_snapshot_is_asked_for_it_says_that_the_tensors_lie_on_several_gpus) {
    if (!have_two_gpus()) return;
    split_model model;
    pinned_staging staging(2 * block, block, {.snapshots = 1});
    BOOST_TEST(staging.prepare_snapshots(varve::safetensors{}.lay_out(model.state), model.state, 1) == 0u);
    BOOST_TEST(staging.describe().find("several GPUs") != std::string::npos, staging.describe());
}

BOOST_AUTO_TEST_CASE(bytes_reach_both_gpus_and_come_back_through_a_transfer_of_one) {
    if (!have_two_gpus()) return;
    split_model model;
    two_streams streams;
    varve::cuda::transfer way(streams.order(0).stream);
    std::vector<varve::tensor const*> all;
    std::vector<std::byte> expected;
    for (auto const& layer : model.state.layers)
        for (auto const& t : layer.tensors) {
            auto const bytes = numbered_bytes(t.size_bytes(), expected.size());
            write_all(way, t, bytes);
            all.push_back(&t);
            expected.insert(expected.end(), bytes.begin(), bytes.end());
        }
    way.finish();
    BOOST_TEST((read_all(way, all) == expected));
}

BOOST_AUTO_TEST_SUITE_END()
