// How long 4 bytes take from the GPU to the host, a training's loss say, while an image is on its way there: all of its copies in one
// stream, and in pieces on two streams in turn, each behind the one before it (see varve/cuda/detail/yielding_copies.hpp).

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include "varve/cuda/device.hpp"
#include "varve/cuda/error.hpp"
#include "varve/cuda/memory.hpp"

#include "timing.hpp"

namespace {

using varve::cuda::throw_if;
using varve_bench::clock_type, varve_bench::median, varve_bench::ms_since;

constexpr std::size_t image_bytes = 344u << 20;

class copy_engine {
public:
    /// Enqueues the image's copies, in pieces on so many streams in turn.
    void enqueue(std::size_t streams, std::size_t piece_bytes) {
        std::size_t turn = 0;
        for (std::size_t at = 0; at < image_bytes; at += piece_bytes, ++turn) {
            auto const stream = copies_[turn % streams].get();
            if (turn > 0) throw_if(::cudaStreamWaitEvent(stream, piece_, 0), "a piece");
            throw_if(::cudaMemcpyAsync(host_.data() + at, device_.data() + at, std::min(piece_bytes, image_bytes - at), cudaMemcpyDefault, stream),
                     "a piece");
            throw_if(::cudaEventRecord(piece_, stream), "a piece");
        }
    }

    /// 4 bytes behind a little work, ms.
    double read_loss() {
        auto const start = clock_type::now();
        throw_if(::cudaMemsetAsync(loss_.data(), 1, 4, reading_.get()), "the loss");
        throw_if(::cudaMemcpyAsync(loss_at_host_.data(), loss_.data(), 4, cudaMemcpyDefault, reading_.get()), "the loss");
        throw_if(::cudaStreamSynchronize(reading_.get()), "the loss");
        return ms_since(start);
    }

    bool copying() const { return ::cudaEventQuery(piece_) == cudaErrorNotReady; }
    void wait() { throw_if(::cudaEventSynchronize(piece_), "the image"); }

private:
    varve::cuda::device_bytes device_{image_bytes}, loss_{4};
    varve::cuda::page_locked host_{image_bytes}, loss_at_host_{4};
    std::array<varve::cuda::side_stream, 2> copies_{varve::cuda::side_stream(true), varve::cuda::side_stream(true)};
    varve::cuda::side_stream reading_{false};
    cudaEvent_t piece_ = [] {
        cudaEvent_t made = nullptr;
        throw_if(::cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "an event");
        return made;
    }();
};

}  // namespace

int main() {
    int devices = 0;
    if (::cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("no GPU here");
        return 77;
    }
    copy_engine engine;
    auto show = [&](std::string const& what, std::size_t streams, std::size_t piece_bytes) {
        std::vector<double> rate, loss;
        for (int i = 0; i < 20; ++i) {
            auto const start = clock_type::now();
            engine.enqueue(streams, piece_bytes);
            engine.wait();
            rate.push_back(static_cast<double>(image_bytes) / ms_since(start) / 1e6);
            engine.enqueue(streams, piece_bytes);
            while (engine.copying()) loss.push_back(engine.read_loss());
        }
        std::printf("%-38s 4 bytes take %.3f ms, the image goes at %.1f GB/s\n", what.c_str(), median(loss), median(rate));
    };
    std::vector<double> alone;
    for (int i = 0; i < 200; ++i) alone.push_back(engine.read_loss());
    std::printf("%-38s 4 bytes take %.3f ms\n", "alone", median(alone));
    show("one stream, all at once", 1, image_bytes);
    show("one stream, pieces of 8 MiB", 1, 8u << 20);
    for (std::size_t mib : {64, 32, 16, 8, 4}) show("two streams, pieces of " + std::to_string(mib) + " MiB", 2, mib << 20);
    return 0;
}
