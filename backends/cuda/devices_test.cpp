#include <boost/test/unit_test.hpp>

#include <array>
#include <chrono>

#include "device_model.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::cuda::device_scope;
using varve::cuda::pinned_staging;
constexpr std::size_t block = varve::block_unit_bytes;

bool have_two_gpus() {
    if (!have_gpu()) return false;
    int count = 0;
    expect(::cudaGetDeviceCount(&count));
    if (count > 1) return true;
    skip("one GPU here");
    return false;
}

/// A stream of each device.
struct two_streams {
    two_streams() {
        for (int d = 0; d < 2; ++d) {
            device_scope on(d);
            streams[d] = std::make_unique<user_stream>();
        }
    }
    varve::cuda::stream_order order(std::size_t device) const { return {streams[device]->stream, static_cast<int>(device)}; }
    /// What `device` does from now on follows what the other one has in its stream.
    void join(std::size_t device) {
        device_scope on_other(static_cast<int>(1 - device));
        cudaEvent_t event = nullptr;
        expect(::cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        expect(::cudaEventRecord(event, streams[1 - device]->stream));
        {
            device_scope on(static_cast<int>(device));
            expect(::cudaStreamWaitEvent(streams[device]->stream, event, 0));
        }
        expect(::cudaEventDestroy(event));
    }
    std::array<std::unique_ptr<user_stream>, 2> streams;
};

/// Layers of two tensors: of the even ones both lie on GPU 0, of the odd ones on GPU 1, of the last one on either.
struct split_model {
    static constexpr std::size_t layers = 5, bytes = block + 4099;

    split_model() {
        for (std::size_t l = 0; l < layers; ++l) {
            varve::layer layer{"layer" + std::to_string(l), {}};
            for (std::size_t t = 0; t < 2; ++t) {
                device_scope on(static_cast<int>(device_of(l, t)));
                memory.push_back(std::make_unique<device_bytes>(bytes + l + t));
                auto const size = static_cast<std::int64_t>(memory.back()->size);
                layer.tensors.push_back(
                    {layer.name + "." + std::to_string(t), varve::dtype::U8, {size}, memory.back()->data, {}, varve::memory_kind::device});
            }
            state.layers.push_back(std::move(layer));
        }
    }
    static std::size_t device_of(std::size_t layer, std::size_t tensor) { return layer + 1 == layers ? tensor : layer % 2; }

    template <class Checkpointer>
    void update(Checkpointer& ck, std::size_t layer, std::uint64_t step, two_streams& streams, bool announce) {
        auto const first = device_of(layer, 0);
        ck.before_update(layer, streams.order(first));
        bool const split = device_of(layer, 1) != first;
        if (split) streams.join(1 - first);
        for (std::size_t t = 0; t < 2; ++t) {
            auto const device = device_of(layer, t);
            device_scope on(static_cast<int>(device));
            auto const& m = *memory[layer * 2 + t];
            // It takes the GPU a while, and the CPU runs ahead.
            for (int i = 0; i < 50; ++i) expect(::cudaMemsetAsync(m.data, 0xEE, m.size, streams.order(device).stream));
            expect(::cudaMemsetAsync(m.data, static_cast<int>(step), m.size, streams.order(device).stream));
        }
        if (split) streams.join(first);
        if (announce) ck.layer_ready(layer, streams.order(first));
    }

    std::vector<std::unique_ptr<device_bytes>> memory;
    varve::state state;
};

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling, std::size_t pool_blocks, std::size_t snapshots) {
    split_model model;
    two_streams streams;
    varve_test::never_mixes_steps(model.state, pinned_staging(pool_blocks * block, block, {.snapshots = snapshots}), scheduling, 2ms,
                                  streams.order(0), [&](auto& ck, std::uint64_t step, bool saves) {
                                      for (std::size_t l = 0; l < split_model::layers; ++l) model.update(ck, l, step, streams, saves);
                                  });
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_devices)

BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_state_on_two_gpus_mixes_steps) {
    if (!have_two_gpus()) return;
    for (std::size_t pool_blocks : {2, 64}) {
        never_mixes_steps(varve::async<3>{}, pool_blocks, 0);
        never_mixes_steps(varve::layerwise<3>{}, pool_blocks, 0);
        // There is none for such a state, and saves go on without.
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
