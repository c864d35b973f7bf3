// What a save from the GPU costs the training thread, how long its copies take, and how long a loss takes to the host meanwhile: a
// state of 444 tensors, 1.46 GB.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "varve/checkpointer.hpp"
#include "varve/cuda/pinned_staging.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/sink/null.hpp"

#include "timing.hpp"

using varve_bench::clock_type, varve_bench::median, varve_bench::ms_since;

int main() {
    int devices = 0;
    if (::cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::puts("no GPU here");
        return 77;
    }
    constexpr std::size_t layers = 74, block = std::size_t{32} << 20;
    varve::state s;
    std::vector<std::uint64_t> steps(layers * 2);
    for (std::size_t l = 0; l < layers; ++l) {
        varve::layer layer{"layer" + std::to_string(l), {}};
        for (std::size_t t = 0; t < 6; ++t) {
            std::int64_t const floats = t % 2 == 0 ? 1646592 : 1024;
            void* data = nullptr;
            varve::cuda::throw_if(::cudaMalloc(&data, static_cast<std::size_t>(floats) * 4), "cudaMalloc");
            varve::cuda::throw_if(::cudaMemset(data, static_cast<int>(l + t), static_cast<std::size_t>(floats) * 4), "cudaMemset");
            layer.tensors.push_back({layer.name + "." + std::to_string(t), varve::dtype::F32, {floats}, data, {}, varve::memory_kind::device});
        }
        for (std::size_t t = 0; t < 2; ++t)
            layer.tensors.push_back({layer.name + ".step" + std::to_string(t), varve::dtype::I64, {}, &steps[l * 2 + t], {}});
        s.layers.push_back(std::move(layer));
    }
    cudaStream_t stream = nullptr, reading = nullptr;
    for (auto* each : {&stream, &reading}) varve::cuda::throw_if(::cudaStreamCreateWithFlags(each, cudaStreamNonBlocking), "stream");
    varve::cuda::page_locked const host(4);
    auto const img = varve::safetensors{}.lay_out(s);
    std::printf("image %.0f MB\n", static_cast<double>(img.size_bytes) / 1e6);

    auto pinning = clock_type::now();
    varve::cuda::pinned_staging staging(8 * block, block, {.snapshots = 2});
    std::printf("page-locking %zu MB: %.0f ms\n", 8 * block >> 20, ms_since(pinning));
    staging.prepare_snapshots(img, s, 2);
    std::printf("%s\n", staging.describe().c_str());
    {
        std::vector<std::size_t> all(layers);
        for (std::size_t l = 0; l < layers; ++l) all[l] = l;
        std::vector<double> cpu, whole;
        for (int i = 0; i < 50; ++i) {
            auto shot = staging.acquire_snapshot();
            std::vector<varve::cuda::event> points(layers, staging.record({stream}));
            auto start = clock_type::now();
            auto token = staging.take(shot, all, points);
            cpu.push_back(ms_since(start));
            token.wait();
            whole.push_back(ms_since(start));
        }
        std::printf("snapshot: CPU of the thread that takes it %.3f ms, until done %.3f ms (%.2f TB/s read and written)\n", median(cpu),
                    median(whole), 2 * static_cast<double>(img.data_bytes()) / median(whole) / 1e9);
    }
    for (std::size_t snapshots : {0, 2}) {
        varve::cuda::pinned_staging own(8 * block, block, {.snapshots = snapshots});
        varve::checkpointer_options options;
        options.digest_workers = 16;
        varve::checkpointer<varve::cuda::pinned_staging, varve::async<2>, varve::null_sink> ck(s, std::move(own), {}, {}, options);
        std::vector<double> stall, before, durable;
        for (std::uint64_t step = 1; step <= 30; ++step) {
            auto start = clock_type::now();
            auto ticket = ck.save(step, {}, {stream});
            stall.push_back(ms_since(start));
            auto next = clock_type::now();
            ck.before_update_all({stream});
            before.push_back(ms_since(next));
            ticket.durable().wait();
            durable.push_back(ms_since(start));
        }
        std::printf("%zu snapshots: save %.3f ms, before_update at once after it %.3f ms, digested and gone %.1f ms (%.1f GB/s)\n", snapshots,
                    median(stall), median(before), median(durable), static_cast<double>(img.size_bytes) / median(durable) / 1e6);
        // As a training reads its loss, in a stream that nothing else is in.
        auto read_loss = [&] {
            auto const start = clock_type::now();
            varve::cuda::throw_if(::cudaMemcpyAsync(host.data(), s.layers[0].tensors[0].data, 4, cudaMemcpyDefault, reading), "the loss");
            varve::cuda::throw_if(::cudaStreamSynchronize(reading), "the loss");
            return ms_since(start);
        };
        std::vector<double> alone, meanwhile;
        for (std::uint64_t step = 31; step <= 60; ++step) {
            alone.push_back(read_loss());
            auto ticket = ck.save(step, {}, {stream});
            do {
                meanwhile.push_back(read_loss());
                std::this_thread::sleep_for(std::chrono::microseconds(50 + meanwhile.size() * 71 % 300));
            } while (!ticket.durable().ready());
        }
        std::ranges::sort(meanwhile);
        std::printf("%zu snapshots: 4 bytes to the host take %.3f ms, during a save %.3f ms (p99 %.3f)\n", snapshots, median(alone),
                    median(meanwhile), meanwhile[meanwhile.size() * 99 / 100]);
    }
    return 0;
}
