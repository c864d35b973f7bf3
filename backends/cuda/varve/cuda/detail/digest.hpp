#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// The part that nvcc compiles. This header is plain C++ and is read by nvcc too, in C++17.

namespace varve::cuda::detail {

inline constexpr std::size_t chunk_bytes = 64u << 10;

/// Loads the kernel on the current device; see load_gather.
cudaError_t load_chunk_digests() noexcept;

/// Puts the XXH3-64 of each chunk of `size_bytes` bytes in GPU memory, at an address that is a multiple of 16, to `out`, in
/// GPU or page-locked host memory; they are there when the work in `stream` is done. The last chunk may be shorter.
cudaError_t chunk_digests(std::byte const* data, std::size_t size_bytes, std::uint64_t* out, cudaStream_t stream) noexcept;

}  // namespace varve::cuda::detail
