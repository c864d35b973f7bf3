#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <vector>

#include "varve/detail/digest.hpp"

namespace {

using namespace varve::detail;

std::vector<std::byte> bytes_of(std::size_t size) {
    std::vector<std::byte> out(size);
    std::uint32_t x = 1;
    for (auto& b : out) b = static_cast<std::byte>((x = x * 1664525u + 1013904223u) >> 24);
    return out;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(digest)

BOOST_AUTO_TEST_CASE(the_digest_is_xxh3_with_seed_0) {
    // The published value for no bytes at all.
    BOOST_TEST(varve::detail::digest({}) == 0x2d06800538d394c2u);
}

BOOST_AUTO_TEST_CASE(the_last_chunk_is_as_long_as_it_is) {
    auto data = bytes_of(varve::digest_chunk_bytes + 5);
    std::vector<std::uint64_t> out(2);
    BOOST_TEST(chunk_digests(data, out) == 2u);
    BOOST_TEST(out[0] == varve::detail::digest(std::span(data).first(varve::digest_chunk_bytes)));
    BOOST_TEST(out[1] == varve::detail::digest(std::span(data).last(5)));
    BOOST_TEST(chunk_digests({}, out) == 0u);
    BOOST_TEST(chunk_count(0) == 0u);
    BOOST_TEST(chunk_count(1) == 1u);
    BOOST_TEST(granule_count(granule_bytes + 1) == 2u);
}

BOOST_AUTO_TEST_CASE(a_granule_has_the_digest_of_its_chunks_digests_as_little_endian_bytes) {
    std::vector<std::uint64_t> const chunks{0x0102030405060708u, 0x1112131415161718u};
    std::vector<std::byte> expected;
    for (int i : {8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11}) expected.push_back(static_cast<std::byte>(i));
    BOOST_TEST(granule_digest(chunks) == varve::detail::digest(expected));
}

BOOST_AUTO_TEST_CASE(the_text_has_16_digits_a_granule_and_is_empty_for_no_data) {
    std::vector<std::uint64_t> chunks(chunks_per_granule + 1, 7);
    auto text = granule_digests_text(chunks);
    BOOST_TEST(text.size() == 32u);
    BOOST_TEST(text.substr(0, 16) == hex(granule_digest(std::span(chunks).first(chunks_per_granule))));
    BOOST_TEST(text.substr(16) == hex(granule_digest(std::span(chunks).last(1))));
    BOOST_TEST(granule_digests_text({}) == "");
}

BOOST_AUTO_TEST_CASE(hex_digits_are_lower_case_most_significant_first) {
    BOOST_TEST(hex(0x00ab0000000000cdu) == "00ab0000000000cd");
    BOOST_TEST((parse_hex("00ab0000000000cd") == 0x00ab0000000000cdu));
    for (char const* wrong : {"", "00AB0000000000cd", "00ab0000000000c", "00ab0000000000cdd", "00ab0000000000cg"})
        BOOST_TEST(!parse_hex(wrong).has_value());
}

BOOST_AUTO_TEST_CASE(a_digest_in_pieces_is_the_digest_of_the_whole) {
    auto data = bytes_of(100'000);
    running_digest sum;
    sum.add(std::span(data).first(1));
    sum.add(std::span(data).subspan(1, 70'000));
    sum.add(std::span(data).subspan(70'001));
    BOOST_TEST(sum.value() == varve::detail::digest(data));
}

BOOST_AUTO_TEST_SUITE_END()
