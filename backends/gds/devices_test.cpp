#include <boost/test/unit_test.hpp>

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "two_gpus.hpp"
#include "varve/cuda/shared_memory.hpp"
#include "varve/gds/staging.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"

namespace {

using namespace varve_test;
using varve::gds::staging;
constexpr std::size_t block = varve::block_unit_bytes;

/// A pool that a monitor can have too, on GPU 0.
staging in_shared_memory(std::size_t pool_blocks, std::span<int const> others) {
    auto memory = std::make_shared<varve::cuda::shared_memory>(pool_blocks * block, block, others);
    BOOST_TEST_REQUIRE(memory->regions().size() == 1u);
    auto const bytes = memory->regions().front().memory;
    return {bytes, block, std::move(memory)};
}

std::vector<std::byte> fetch_all(device_bytes const& m) {
    std::vector<std::byte> out(m.size);
    expect(::cudaMemcpy(out.data(), m.data, m.size, cudaMemcpyDefault));
    return out;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(gds_devices)

BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_state_on_two_gpus_mixes_steps) {
    if (!have_two_gpus()) return;
    for (std::size_t pool_blocks : {2, 64}) {
        never_mixes_steps_of_two(staging(pool_blocks * block, block), varve::async<3>{});
        never_mixes_steps_of_two(staging(pool_blocks * block, block), varve::layerwise<3>{}, true);
        // There is no snapshot of such a state, and saves go on without.
        never_mixes_steps_of_two(staging(pool_blocks * block, block, {.snapshots = 2}), varve::layerwise<2>{});
    }
}

BOOST_AUTO_TEST_CASE(nor_where_the_pool_is_memory_that_is_shared) {
    if (!have_two_gpus()) return;
    int reached = 0;
    expect(::cudaDeviceCanAccessPeer(&reached, 1, 0));
    if (reached == 0) return skip("GPU 1 does not reach the memory of GPU 0");
    for (std::size_t pool_blocks : {2, 64}) {
        never_mixes_steps_of_two(in_shared_memory(pool_blocks, std::array{1}), varve::async<3>{});
        never_mixes_steps_of_two(in_shared_memory(pool_blocks, std::array{0, 1, 1}), varve::layerwise<3>{}, true);
    }
}

BOOST_AUTO_TEST_CASE(a_save_that_a_gpu_may_not_reach_the_pool_for_fails_and_breaks_nothing) {
    if (!have_two_gpus()) return;
    split_model model(true);
    two_streams streams;
    auto log = std::make_shared<checking_sink::log>();
    varve::checkpointer<staging, varve::async<2>, checking_sink> ck(model.state, in_shared_memory(16, {}), varve::async<2>{},
                                                                    checking_sink(model.state, log));
    for (std::uint64_t step = 1; step <= 2; ++step) {
        ck.begin(step);
        for (std::size_t l = 0; l < split_model::layers; ++l) model.update(ck, l, step, streams, true);
        auto const saved = ck.seal({}, streams.order(0));
        BOOST_TEST(static_cast<bool>(saved.durable().wait()));
    }
    ck.drain();
    BOOST_TEST(log->steps.empty());
    for (std::size_t device : {0, 1}) {
        varve::cuda::device_scope on(static_cast<int>(device));
        expect(::cudaDeviceSynchronize());
    }
    for (auto const& m : model.memory) BOOST_TEST((fetch_all(*m) == std::vector(m->size, std::byte{2})));
}

BOOST_AUTO_TEST_CASE(gpu_memory_to_be_shared_is_not_to_be_had_for_a_gpu_that_is_not_there) {
    if (!have_gpu()) return;
    BOOST_CHECK_THROW(varve::cuda::shared_memory(block, block, std::array{1'000}), varve::error);
}

BOOST_AUTO_TEST_SUITE_END()
