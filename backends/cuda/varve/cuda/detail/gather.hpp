#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// The part that nvcc compiles. This header is plain C++ and is read by nvcc too, in C++17.

namespace varve::cuda::detail {

/// A stretch of bytes to put aside. The least that a block of threads takes on: 64 KiB, or what is left of a tensor.
struct piece {
    std::uint64_t source = 0;  ///< an address in GPU memory, or an offset in the mirror
    std::uint64_t target_offset = 0;
    std::uint32_t size_bytes = 0;
    std::uint32_t from_mirror = 0;
};

inline constexpr std::size_t largest_piece_bytes = 64u << 10;

/// A tensor that does not lie in row-major order.
struct strided_source {
    static constexpr int max_dimensions = 8;
    void const* data = nullptr;
    std::int64_t shape[max_dimensions] = {};
    std::int64_t strides[max_dimensions] = {};  ///< in elements
    int dimensions = 0;
    std::uint32_t element_bytes = 1;
};

/// Whether the kernels were compiled in; where not, each of these answers with cudaErrorNotSupported.
bool has_kernels() noexcept;

/// Loads these kernels on the current device. A first launch would do it too, and may wait for all that the device has to do.
cudaError_t load_gather() noexcept;

/// Copies `count` pieces, whose table lies in GPU memory, to `target` plus their offsets; `mirror` is page-locked host memory.
cudaError_t gather(piece const* table, std::size_t count, std::byte* target, std::byte const* mirror, cudaStream_t stream) noexcept;

/// Copies bytes [offset, offset + size) of the tensor's row-major form to `to`, in GPU or page-locked host memory.
cudaError_t gather_strided(strided_source const& from, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte* to,
                           cudaStream_t stream) noexcept;

}  // namespace varve::cuda::detail
