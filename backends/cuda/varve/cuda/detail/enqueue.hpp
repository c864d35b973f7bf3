#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <system_error>

#include "varve/cuda/detail/gather.hpp"
#include "varve/cuda/error.hpp"
#include "varve/detail/gather.hpp"
#include "varve/state.hpp"

namespace varve::cuda::detail {

/// The device that holds the memory at `data`. An error where it is no memory of CUDA's.
inline std::error_code device_of(void const* data, int& device) noexcept {
    cudaPointerAttributes about{};
    if (auto ec = code_of(::cudaPointerGetAttributes(&about, data))) return ec;
    if (about.type != cudaMemoryTypeDevice && about.type != cudaMemoryTypeManaged) return std::make_error_code(std::errc::bad_address);
    device = about.device;
    return {};
}

/// Enqueues the copy of bytes [offset, offset + size) of the tensor's row-major form to `to`; the tensor lies in the memory
/// of the calling thread's device. One call for a contiguous tensor, one kernel for another where kernels were built and `reached`
/// says that those of this device can write there; else one copy a run of bytes.
inline std::error_code enqueue(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte* to, cudaStream_t stream,
                               bool reached = true) noexcept {
    if (!varve::detail::is_contiguous(t) && reached && has_kernels() && t.shape.size() <= strided_source::max_dimensions) {
        strided_source from{
            .data = t.data, .dimensions = static_cast<int>(t.shape.size()), .element_bytes = static_cast<std::uint32_t>(element_bytes(t.type))};
        std::copy(t.shape.begin(), t.shape.end(), from.shape);
        std::copy(t.strides.begin(), t.strides.end(), from.strides);
        return code_of(gather_strided(from, offset_bytes, size_bytes, to, stream));
    }
    std::error_code failed;
    varve::detail::for_each_run(t, offset_bytes, size_bytes, [&](std::byte const* address, std::size_t at, std::size_t n) {
        if (!failed) failed = code_of(::cudaMemcpyAsync(to + at, address, n, cudaMemcpyDefault, stream));
    });
    return failed;
}

}  // namespace varve::cuda::detail
