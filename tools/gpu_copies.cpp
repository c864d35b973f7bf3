#include "gpu_copies.hpp"

#include "build_config.hpp"

#if VARVE_TOOL_WITH_CUDA_RUNTIME

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "varve/cuda/device.hpp"
#include "varve/cuda/memory.hpp"

namespace varve::tool {

std::map<std::string, double> gpu_copy_rates() {
    using clock = std::chrono::steady_clock;
    constexpr std::size_t bytes = 256u << 20;
    constexpr int rounds = 5;
    std::map<std::string, double> rates;
    int count = 0;
    if (cuda::code_of(::cudaGetDeviceCount(&count)) || count == 0) return rates;
    try {
        cuda::side_stream stream(false);
        cuda::page_locked host(bytes);
        cuda::stream_memory from(bytes, stream.get()), to(bytes, stream.get());
        std::memset(host.data(), 1, bytes);
        auto measure = [&](char const* name, void* target, void const* source) {
            // The first one does not count: the device may have been idle.
            double best = 0;
            for (int i = 0; i <= rounds; ++i) {
                auto const start = clock::now();
                cuda::throw_if(::cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream.get()), name);
                cuda::throw_if(::cudaStreamSynchronize(stream.get()), name);
                if (i > 0) best = std::max(best, static_cast<double>(bytes) / 1e9 / std::chrono::duration<double>(clock::now() - start).count());
            }
            rates[name] = best;
        };
        measure("host_to_device_gb_per_s", from.data(), host.data());
        measure("device_to_host_gb_per_s", host.data(), from.data());
        measure("device_to_device_gb_per_s", to.data(), from.data());
    } catch (error const&) {
        // A GPU that is full or broken has no rates.
    }
    return rates;
}

}  // namespace varve::tool

#else

namespace varve::tool {

std::map<std::string, double> gpu_copy_rates() { return {}; }

}  // namespace varve::tool

#endif
