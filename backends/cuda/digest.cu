#include "varve/cuda/detail/digest.hpp"
#include "varve/cuda/detail/xxh3.hpp"

namespace varve::cuda::detail {

namespace {

constexpr unsigned threads = 256, warps = threads / 32;
constexpr unsigned most_blocks = chunk_bytes / xxh3::block_bytes;

__constant__ xxh3::default_secret secret;

/// A chunk a block of threads. Each warp sums blocks of 1,024 bytes: a thread takes two neighbouring words of two stripes, 8
/// stripes apart. Then 8 threads go along the chain of sums, one a lane.
__global__ void __launch_bounds__(threads) digest_kernel(unsigned char const* data, std::uint64_t size, std::uint64_t* out) {
    __shared__ std::uint64_t keys[sizeof(secret.bytes) / 8];
    __shared__ std::uint64_t sums[most_blocks][xxh3::lanes];
    __shared__ std::uint64_t accumulators[xxh3::lanes];

    std::uint64_t const begin = std::uint64_t{blockIdx.x} * chunk_bytes;
    auto const* in = data + begin;
    auto const n = static_cast<std::uint32_t>(size - begin < chunk_bytes ? size - begin : chunk_bytes);
    if (n <= xxh3::longest_short_bytes) {
        if (threadIdx.x == 0) out[blockIdx.x] = xxh3::hash_short(in, n, secret.bytes);
        return;
    }
    for (unsigned i = threadIdx.x; i < sizeof(secret.bytes) / 8; i += threads) keys[i] = xxh3::read64(secret.bytes + 8 * i);
    __syncthreads();

    auto const whole = static_cast<unsigned>(xxh3::whole_blocks(n));
    auto const rest = static_cast<unsigned>(xxh3::stripes_after(n));
    unsigned const warp = threadIdx.x / 32, pair = threadIdx.x % 4, row = threadIdx.x % 32 / 4;
    std::uint64_t const key00 = keys[row + 2 * pair], key01 = keys[row + 2 * pair + 1];
    std::uint64_t const key10 = keys[row + 8 + 2 * pair], key11 = keys[row + 8 + 2 * pair + 1];
#pragma unroll 4
    for (unsigned b = warp; b <= whole; b += warps) {
        unsigned const stripes = b < whole ? static_cast<unsigned>(xxh3::stripes_per_block) : rest;
        auto const* from = reinterpret_cast<ulonglong2 const*>(in + b * xxh3::block_bytes + row * xxh3::stripe_bytes) + pair;
        ulonglong2 first{0, 0}, second{0, 0};
        bool const has_first = row < stripes, has_second = row + 8 < stripes;
        if (has_first) first = from[0];
        if (has_second) second = from[8 * xxh3::stripe_bytes / sizeof(ulonglong2)];
        std::uint64_t even = first.y + second.y, odd = first.x + second.x;
        if (has_first) {
            even += xxh3::product(first.x, key00);
            odd += xxh3::product(first.y, key01);
        }
        if (has_second) {
            even += xxh3::product(second.x, key10);
            odd += xxh3::product(second.y, key11);
        }
#pragma unroll
        for (int apart = 4; apart < 32; apart *= 2) {
            even += __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(even), apart);
            odd += __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(odd), apart);
        }
        if (row == 0) {
            sums[b][2 * pair] = even;
            sums[b][2 * pair + 1] = odd;
        }
    }
    __syncthreads();

    if (threadIdx.x >= xxh3::lanes) return;
    unsigned const lane = threadIdx.x;
    std::uint64_t a = xxh3::initial(lane);
    std::uint64_t const key = keys[xxh3::scramble_key / 8 + lane];
#pragma unroll 8
    for (unsigned b = 0; b < whole; ++b) a = xxh3::scramble(a + sums[b][lane], key);
    std::uint64_t const word = xxh3::read64(in + n - xxh3::stripe_bytes + 8 * lane);
    a += sums[whole][lane] + xxh3::product(word, xxh3::read64(secret.bytes + xxh3::last_stripe_key + 8 * lane));
    a += __shfl_xor_sync(0xFFu, static_cast<unsigned long long>(word), 1);
    accumulators[lane] = a;
    __syncwarp(0xFFu);
    if (lane == 0) out[blockIdx.x] = xxh3::merge(accumulators, n, secret.bytes);
}

}  // namespace

cudaError_t load_chunk_digests() noexcept {
    cudaFuncAttributes loaded;
    return cudaFuncGetAttributes(&loaded, digest_kernel);
}

cudaError_t chunk_digests(std::byte const* data, std::size_t size_bytes, std::uint64_t* out, cudaStream_t stream) noexcept {
    if (size_bytes == 0) return cudaSuccess;
    if (reinterpret_cast<std::uintptr_t>(data) % sizeof(ulonglong2) != 0) return cudaErrorMisalignedAddress;
    auto const chunks = static_cast<unsigned>((size_bytes + chunk_bytes - 1) / chunk_bytes);
    digest_kernel<<<chunks, threads, 0, stream>>>(reinterpret_cast<unsigned char const*>(data), size_bytes, out);
    return cudaGetLastError();
}

}  // namespace varve::cuda::detail
