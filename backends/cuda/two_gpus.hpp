#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device_model.hpp"
#include "varve/cuda/device.hpp"

namespace varve_test {

/// Whether there are two to test on; where not, the running test is skipped.
inline bool have_two_gpus() {
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
            varve::cuda::device_scope on(d);
            streams[d] = std::make_unique<user_stream>();
        }
    }
    varve::cuda::stream_order order(std::size_t device) const { return {streams[device]->stream, static_cast<int>(device)}; }
    /// What `device` does from now on follows what the other one has in its stream.
    void join(std::size_t device) {
        varve::cuda::device_scope on_other(static_cast<int>(1 - device));
        cudaEvent_t event = nullptr;
        expect(::cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        expect(::cudaEventRecord(event, streams[1 - device]->stream));
        {
            varve::cuda::device_scope on(static_cast<int>(device));
            expect(::cudaStreamWaitEvent(streams[device]->stream, event, 0));
        }
        expect(::cudaEventDestroy(event));
    }
    std::array<std::unique_ptr<user_stream>, 2> streams;
};

/// Layers of two tensors: of the even ones both lie on GPU 0, of the odd ones on GPU 1, of the last one on either. `strided`: there
/// are gaps between the second ones' rows.
struct split_model {
    static constexpr std::size_t layers = 5, bytes = varve::block_unit_bytes + 4099;

    explicit split_model(bool strided = false) {
        for (std::size_t l = 0; l < layers; ++l) {
            varve::layer layer{"layer" + std::to_string(l), {}};
            for (std::size_t t = 0; t < 2; ++t) {
                varve::cuda::device_scope on(static_cast<int>(device_of(l, t)));
                memory.push_back(std::make_unique<device_bytes>(bytes + l + t));
                auto const size = static_cast<std::int64_t>(memory.back()->size);
                layer.tensors.push_back(
                    {layer.name + "." + std::to_string(t), varve::dtype::U8, {size}, memory.back()->data, {}, varve::memory_kind::device});
            }
            if (strided) {
                layer.tensors.back().shape = {3, 1 << 20};
                layer.tensors.back().strides = {(1 << 20) + 999, 1};
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
            varve::cuda::device_scope on(static_cast<int>(device));
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

/// As never_mixes_steps, with a state on both of them.
template <class Staging, class Scheduling>
void never_mixes_steps_of_two(Staging staging, Scheduling scheduling, bool strided = false) {
    split_model model(strided);
    two_streams streams;
    never_mixes_steps(model.state, std::move(staging), scheduling, std::chrono::milliseconds(2), streams.order(0),
                      [&](auto& ck, std::uint64_t step, bool saves) {
                          for (std::size_t l = 0; l < split_model::layers; ++l) model.update(ck, l, step, streams, saves);
                      });
}

}  // namespace varve_test
