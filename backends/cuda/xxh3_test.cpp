#include <boost/test/unit_test.hpp>

#include <cstdint>
#include <vector>

#include "support.hpp"
#include "varve/cuda/detail/xxh3.hpp"
#include "varve/detail/digest.hpp"

namespace {

std::vector<unsigned char> bytes_of(std::size_t size) {
    std::vector<unsigned char> out(size);
    std::uint32_t x = 1;
    for (auto& b : out) b = static_cast<unsigned char>((x = x * 1664525u + 1013904223u) >> 24);
    return out;
}

bool agrees(std::vector<unsigned char> const& bytes, std::size_t at, std::size_t n) {
    constexpr varve::cuda::xxh3::default_secret secret;
    return varve::cuda::xxh3::hash(bytes.data() + at, n, secret.bytes) == varve::detail::digest(std::as_bytes(std::span(bytes)).subspan(at, n));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_xxh3)

BOOST_AUTO_TEST_CASE(every_length_of_up_to_two_blocks_gives_the_librarys_digest) {
    auto bytes = bytes_of(4096);
    for (std::size_t n = 0; n <= 2200; ++n) BOOST_TEST(agrees(bytes, n % 3, n), n << " bytes");
}

BOOST_AUTO_TEST_CASE(lengths_around_each_block_and_stripe_give_the_librarys_digest) {
    auto bytes = bytes_of(varve::digest_chunk_bytes + 64);
    for (std::size_t n = 1024; n <= varve::digest_chunk_bytes; n += varve_test::full() ? 64 : 1024)
        for (std::size_t near : {n - 1, n, n + 1, n + 63, n + 64, n + 65}) {
            if (near > varve::digest_chunk_bytes) continue;
            BOOST_TEST(agrees(bytes, 0, near), near << " bytes");
        }
}

BOOST_AUTO_TEST_CASE(large_values_carry_as_they_should) {
    for (unsigned char value : {0x00, 0x7F, 0x80, 0xFF}) {
        std::vector<unsigned char> bytes(varve::digest_chunk_bytes, value);
        for (std::size_t n : {5u, 12u, 100u, 200u, 241u, 1024u, 65536u}) BOOST_TEST(agrees(bytes, 0, n), n << " times " << int(value));
    }
}

BOOST_AUTO_TEST_SUITE_END()
