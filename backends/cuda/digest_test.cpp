#include <boost/test/unit_test.hpp>

#include <array>
#include <cstdint>
#include <vector>

#include "device_model.hpp"
#include "varve/cuda/detail/digest.hpp"
#include "varve/detail/digest.hpp"

namespace {

using namespace varve_test;

std::vector<std::byte> bytes_of(std::size_t size) {
    std::vector<std::byte> out(size);
    std::uint32_t x = 3;
    for (auto& b : out) b = static_cast<std::byte>((x = x * 1664525u + 1013904223u) >> 24);
    return out;
}

/// The GPU's digests of the first `size` bytes in GPU memory, through page-locked memory.
std::vector<std::uint64_t> on_gpu(std::byte const* data, std::size_t size, varve::cuda::page_locked& found, cudaStream_t stream) {
    auto const count = varve::detail::chunk_count(size);
    auto* out = reinterpret_cast<std::uint64_t*>(found.data());
    out[count] = 42;
    expect(varve::cuda::detail::chunk_digests(data, size, out, stream));
    expect(::cudaStreamSynchronize(stream));
    BOOST_TEST(out[count] == 42u);
    return {out, out + count};
}
std::vector<std::uint64_t> on_cpu(std::vector<std::byte> const& bytes, std::size_t size) {
    std::vector<std::uint64_t> out(varve::detail::chunk_count(size));
    varve::detail::chunk_digests(std::span(bytes).first(size), out);
    return out;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_digest)

BOOST_AUTO_TEST_CASE(the_kernels_digests_are_the_librarys) {
    if (!have_gpu()) return;
    user_stream own;
    auto bytes = bytes_of(3 * varve::digest_chunk_bytes + 4096);
    varve::cuda::device_bytes memory(bytes.size());
    expect(::cudaMemcpy(memory.data(), bytes.data(), bytes.size(), cudaMemcpyDefault));
    settle();
    varve::cuda::page_locked found_there(4096);
    std::vector<std::size_t> sizes;
    for (std::size_t n = 0; n <= 2200; ++n) sizes.push_back(n);
    for (std::size_t n = 3072; n <= varve::digest_chunk_bytes; n += full() ? 1024 : 15 * 1024)
        for (std::size_t near : {n - 1, n, n + 1, n + 63, n + 64, n + 65}) sizes.push_back(near);
    for (std::size_t tail : {0, 1, 16, 17, 128, 129, 240, 241, 1023, 1024, 1025, 4095}) sizes.push_back(3 * varve::digest_chunk_bytes + tail);
    for (auto n : sizes) {
        auto found = on_gpu(memory.data(), n, found_there, own.stream);
        auto expected = on_cpu(bytes, n);
        BOOST_TEST((found == expected), n << " bytes");
    }
}

BOOST_AUTO_TEST_CASE(a_whole_block_is_hashed_at_once) {
    if (!have_gpu()) return;
    user_stream own;
    auto bytes = bytes_of(32u << 20);
    varve::cuda::device_bytes memory(bytes.size());
    expect(::cudaMemcpy(memory.data(), bytes.data(), bytes.size(), cudaMemcpyDefault));
    settle();
    varve::cuda::page_locked out(8 * (varve::detail::chunk_count(bytes.size()) + 1));
    auto found = on_gpu(memory.data(), bytes.size(), out, own.stream);
    BOOST_TEST((found == on_cpu(bytes, bytes.size())));
    cudaEvent_t begin = nullptr, end = nullptr;
    expect(::cudaEventCreate(&begin));
    expect(::cudaEventCreate(&end));
    constexpr int rounds = 20;
    expect(::cudaEventRecord(begin, own.stream));
    for (int i = 0; i < rounds; ++i)
        expect(varve::cuda::detail::chunk_digests(memory.data(), bytes.size(), reinterpret_cast<std::uint64_t*>(out.data()), own.stream));
    expect(::cudaEventRecord(end, own.stream));
    expect(::cudaEventSynchronize(end));
    float ms = 0;
    expect(::cudaEventElapsedTime(&ms, begin, end));
    expect(::cudaEventDestroy(begin));
    expect(::cudaEventDestroy(end));
    BOOST_TEST_MESSAGE("digests on the GPU: " << rounds * (bytes.size() / 1e9) / (ms / 1e3) << " GB/s");
}

BOOST_AUTO_TEST_CASE(an_address_that_is_not_aligned_is_refused) {
    if (!have_gpu()) return;
    varve::cuda::device_bytes memory(4096);
    varve::cuda::page_locked out(8);
    BOOST_TEST(varve::cuda::detail::chunk_digests(memory.data() + 8, 64, reinterpret_cast<std::uint64_t*>(out.data()), nullptr) ==
               cudaErrorMisalignedAddress);
    BOOST_TEST(::cudaPeekAtLastError() == cudaSuccess);
}

BOOST_AUTO_TEST_SUITE_END()
