#include "varve/cuda/detail/gather.hpp"

#include <algorithm>

namespace varve::cuda::detail {

namespace {

constexpr unsigned threads = 256;

/// Several loads under way before the first store: the copy is bound by memory, and by how much of it is in flight.
template <class Word>
__device__ void copy_words(std::byte* to, std::byte const* from, std::uint32_t bytes) {
    constexpr unsigned deep = 4;
    auto const* in = reinterpret_cast<Word const*>(from);
    auto* out = reinterpret_cast<Word*>(to);
    std::uint32_t const words = bytes / sizeof(Word);
    std::uint32_t i = threadIdx.x;
    for (; i + (deep - 1) * threads < words; i += deep * threads) {
        Word held[deep];
#pragma unroll
        for (unsigned k = 0; k < deep; ++k) held[k] = in[i + k * threads];
#pragma unroll
        for (unsigned k = 0; k < deep; ++k) out[i + k * threads] = held[k];
    }
    for (; i < words; i += threads) out[i] = in[i];
    for (std::uint32_t at = words * sizeof(Word) + threadIdx.x; at < bytes; at += threads) to[at] = from[at];
}

__global__ void __launch_bounds__(threads) gather_kernel(piece const* table, std::byte* target, std::byte const* mirror) {
    piece const p = table[blockIdx.x];
    auto const* from = p.from_mirror ? mirror + p.source : reinterpret_cast<std::byte const*>(p.source);
    auto* to = target + p.target_offset;
    auto const alignment = reinterpret_cast<std::uint64_t>(from) | reinterpret_cast<std::uint64_t>(to);
    if (alignment % 16 == 0)
        copy_words<uint4>(to, from, p.size_bytes);
    else if (alignment % 8 == 0)
        copy_words<uint2>(to, from, p.size_bytes);
    else if (alignment % 4 == 0)
        copy_words<std::uint32_t>(to, from, p.size_bytes);
    else
        copy_words<std::uint8_t>(to, from, p.size_bytes);
}

/// A thread an element; the first and the last may be cut, since a block of the image ends where it ends.
__global__ void __launch_bounds__(threads) strided_kernel(strided_source from, std::uint64_t offset, std::uint64_t size, std::byte* to) {
    auto const width = from.element_bytes;
    auto const element = offset / width + std::uint64_t{blockIdx.x} * threads + threadIdx.x;
    auto const begin = element * width;
    if (begin >= offset + size) return;
    std::int64_t distance = 0;
    auto rest = element;
    for (int d = from.dimensions - 1; d >= 0; --d) {
        auto const extent = static_cast<std::uint64_t>(from.shape[d]);
        distance += static_cast<std::int64_t>(rest % extent) * from.strides[d];
        rest /= extent;
    }
    auto const* in = static_cast<std::byte const*>(from.data) + distance * static_cast<std::int64_t>(width);
    for (unsigned b = 0; b < width; ++b)
        if (begin + b >= offset && begin + b < offset + size) to[begin + b - offset] = in[b];
}

}  // namespace

bool has_kernels() noexcept { return true; }

cudaError_t load_gather() noexcept {
    cudaFuncAttributes loaded;
    auto const failed = cudaFuncGetAttributes(&loaded, gather_kernel);
    return failed != cudaSuccess ? failed : cudaFuncGetAttributes(&loaded, strided_kernel);
}

cudaError_t gather(piece const* table, std::size_t count, std::byte* target, std::byte const* mirror, cudaStream_t stream) noexcept {
    if (count == 0) return cudaSuccess;
    gather_kernel<<<static_cast<unsigned>(count), threads, 0, stream>>>(table, target, mirror);
    return cudaGetLastError();
}

cudaError_t gather_strided(strided_source const& from, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte* to,
                           cudaStream_t stream) noexcept {
    if (size_bytes == 0) return cudaSuccess;
    auto const elements = (offset_bytes + size_bytes + from.element_bytes - 1) / from.element_bytes - offset_bytes / from.element_bytes;
    strided_kernel<<<static_cast<unsigned>((elements + threads - 1) / threads), threads, 0, stream>>>(from, offset_bytes, size_bytes, to);
    return cudaGetLastError();
}

}  // namespace varve::cuda::detail
