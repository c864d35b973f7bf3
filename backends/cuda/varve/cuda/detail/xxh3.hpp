#pragma once

#include <cstddef>
#include <cstdint>

// XXH3-64 with seed 0, for nvcc (C++17, --expt-relaxed-constexpr makes constexpr functions device functions) and for any
// C++ compiler. The kernel and hash() below are put together from the same parts.
// Source: xxHash 0.8, xxhash.h, "XXH3"; doc/xxhash_spec.md.

namespace varve::cuda::xxh3 {

inline constexpr std::size_t stripe_bytes = 64;
inline constexpr std::size_t lanes = 8;  ///< words of a stripe, each with an accumulator of its own
inline constexpr std::size_t stripes_per_block = 16;
inline constexpr std::size_t block_bytes = stripes_per_block * stripe_bytes;
inline constexpr std::size_t longest_short_bytes = 240;

inline constexpr std::uint64_t prime32_1 = 0x9E3779B1u, prime32_2 = 0x85EBCA77u, prime32_3 = 0xC2B2AE3Du;
inline constexpr std::uint64_t prime64_1 = 0x9E3779B185EBCA87u, prime64_2 = 0xC2B2AE3D27D4EB4Fu, prime64_3 = 0x165667B19E3779F9u,
                               prime64_4 = 0x85EBCA77C2B2AE63u, prime64_5 = 0x27D4EB2F165667C5u;
inline constexpr std::uint64_t mix_1 = 0x165667919E3779F9u, mix_2 = 0x9FB21C651E98DF25u;

/// A kernel keeps one in constant memory; everything takes the bytes by address.
struct default_secret {
    unsigned char bytes[192] = {
        // clang-format off
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
        0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
        0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
        0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
        0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
        0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
        0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
        0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
        0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
        0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
        0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
        0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
        // clang-format on
    };
};

/// Where in the secret a stripe, the scrambling and the end find their keys.
inline constexpr std::size_t stripe_key_step = 8, scramble_key = 192 - 64, last_stripe_key = 192 - 64 - 7, merge_key = 11;

// Little-endian, at any address.
constexpr std::uint32_t read32(unsigned char const* p) {
    return static_cast<std::uint32_t>(p[0]) | static_cast<std::uint32_t>(p[1]) << 8 | static_cast<std::uint32_t>(p[2]) << 16 |
           static_cast<std::uint32_t>(p[3]) << 24;
}
constexpr std::uint64_t read64(unsigned char const* p) { return read32(p) | static_cast<std::uint64_t>(read32(p + 4)) << 32; }

/// The two halves of the 128-bit product, one on the other.
constexpr std::uint64_t multiply_and_fold(std::uint64_t a, std::uint64_t b) {
    constexpr std::uint64_t low = 0xFFFFFFFFu;
    std::uint64_t const ll = (a & low) * (b & low), hl = (a >> 32) * (b & low), lh = (a & low) * (b >> 32), hh = (a >> 32) * (b >> 32);
    std::uint64_t const cross = (ll >> 32) + (hl & low) + lh;
    return ((cross << 32) | (ll & low)) ^ ((hl >> 32) + (cross >> 32) + hh);
}
constexpr std::uint64_t rotate_left(std::uint64_t v, unsigned by) { return v << by | v >> (64 - by); }
constexpr std::uint64_t swap_bytes(std::uint64_t v) {
    std::uint64_t out = 0;
    for (unsigned i = 0; i < 8; ++i) out = out << 8 | ((v >> 8 * i) & 0xFF);
    return out;
}
constexpr std::uint64_t avalanche(std::uint64_t h) {
    h = (h ^ h >> 37) * mix_1;
    return h ^ h >> 32;
}
constexpr std::uint64_t avalanche_xxh64(std::uint64_t h) {
    h = (h ^ h >> 33) * prime64_2;
    h = (h ^ h >> 29) * prime64_3;
    return h ^ h >> 32;
}

// ---- inputs of up to 240 bytes ----

constexpr std::uint64_t mix_16(unsigned char const* in, unsigned char const* secret) {
    return multiply_and_fold(read64(in) ^ read64(secret), read64(in + 8) ^ read64(secret + 8));
}

constexpr std::uint64_t hash_up_to_16(unsigned char const* in, std::size_t n, unsigned char const* secret) {
    if (n > 8) {
        auto const low = read64(in) ^ read64(secret + 24) ^ read64(secret + 32);
        auto const high = read64(in + n - 8) ^ read64(secret + 40) ^ read64(secret + 48);
        return avalanche(n + swap_bytes(low) + high + multiply_and_fold(low, high));
    }
    if (n >= 4) {
        auto h = (read32(in + n - 4) + (static_cast<std::uint64_t>(read32(in)) << 32)) ^ read64(secret + 8) ^ read64(secret + 16);
        h = (h ^ rotate_left(h, 49) ^ rotate_left(h, 24)) * mix_2;
        h = (h ^ ((h >> 35) + n)) * mix_2;
        return h ^ h >> 28;
    }
    if (n > 0) {
        auto const word = static_cast<std::uint32_t>(in[0]) << 16 | static_cast<std::uint32_t>(in[n >> 1]) << 24 |
                          static_cast<std::uint32_t>(in[n - 1]) | static_cast<std::uint32_t>(n) << 8;
        return avalanche_xxh64(static_cast<std::uint64_t>(word) ^ (read32(secret) ^ read32(secret + 4)));
    }
    return avalanche_xxh64(read64(secret + 56) ^ read64(secret + 64));
}

constexpr std::uint64_t hash_short(unsigned char const* in, std::size_t n, unsigned char const* secret) {
    if (n <= 16) return hash_up_to_16(in, n, secret);
    std::uint64_t h = n * prime64_1;
    if (n <= 128) {
        for (std::size_t i = (n - 1) / 32 + 1; i-- > 0;)
            h += mix_16(in + 16 * i, secret + 32 * i) + mix_16(in + n - 16 * (i + 1), secret + 32 * i + 16);
        return avalanche(h);
    }
    for (std::size_t i = 0; i < 8; ++i) h += mix_16(in + 16 * i, secret + 16 * i);
    h = avalanche(h);
    for (std::size_t i = 8; i < n / 16; ++i) h += mix_16(in + 16 * i, secret + 16 * (i - 8) + 3);
    return avalanche(h + mix_16(in + n - 16, secret + 136 - 17));
}

// ---- longer ones ----
//
// Within a block of 1,024 bytes, a lane's accumulator gets a sum, whose order does not matter. Between blocks it is
// scrambled. So the sums of all blocks can be had side by side, and only a short chain over them is left.

constexpr std::uint64_t initial(std::size_t lane) {
    switch (lane) {
    case 0: return prime32_3;
    case 1: return prime64_1;
    case 2: return prime64_2;
    case 3: return prime64_3;
    case 4: return prime64_4;
    case 5: return prime32_2;
    case 6: return prime64_5;
    default: return prime32_1;
    }
}
/// What a word of a stripe adds to its own lane; the word itself goes to the lane beside it, lane ^ 1.
constexpr std::uint64_t product(std::uint64_t word, std::uint64_t key) { return ((word ^ key) & 0xFFFFFFFFu) * ((word ^ key) >> 32); }
constexpr std::uint64_t scramble(std::uint64_t accumulator, std::uint64_t key) { return (accumulator ^ accumulator >> 47 ^ key) * prime32_1; }

/// How a long input divides: blocks that are scrambled, then stripes, then one more stripe that ends where the input ends.
constexpr std::size_t whole_blocks(std::size_t n) { return (n - 1) / block_bytes; }
constexpr std::size_t stripes_after(std::size_t n) { return (n - 1 - whole_blocks(n) * block_bytes) / stripe_bytes; }

constexpr std::uint64_t merge(std::uint64_t const* accumulators, std::size_t n, unsigned char const* secret) {
    std::uint64_t h = n * prime64_1;
    for (std::size_t i = 0; i < lanes; i += 2)
        h += multiply_and_fold(accumulators[i] ^ read64(secret + merge_key + 8 * i), accumulators[i + 1] ^ read64(secret + merge_key + 8 * i + 8));
    return avalanche(h);
}

/// One stripe's share of the sums.
constexpr void add_stripe(std::uint64_t* sums, unsigned char const* stripe, unsigned char const* keys) {
    for (std::size_t lane = 0; lane < lanes; ++lane) {
        auto const word = read64(stripe + 8 * lane);
        sums[lane ^ 1] += word;
        sums[lane] += product(word, read64(keys + 8 * lane));
    }
}

/// The digest of n bytes, as the kernel computes it, on one thread.
constexpr std::uint64_t hash(unsigned char const* in, std::size_t n, unsigned char const* secret) {
    if (n <= longest_short_bytes) return hash_short(in, n, secret);
    std::uint64_t accumulators[lanes] = {};
    for (std::size_t lane = 0; lane < lanes; ++lane) accumulators[lane] = initial(lane);
    for (std::size_t b = 0; b <= whole_blocks(n); ++b) {
        bool const whole = b < whole_blocks(n);
        std::uint64_t sums[lanes] = {};
        for (std::size_t s = 0; s < (whole ? stripes_per_block : stripes_after(n)); ++s)
            add_stripe(sums, in + b * block_bytes + s * stripe_bytes, secret + s * stripe_key_step);
        if (!whole) add_stripe(sums, in + n - stripe_bytes, secret + last_stripe_key);
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            accumulators[lane] += sums[lane];
            if (whole) accumulators[lane] = scramble(accumulators[lane], read64(secret + scramble_key + 8 * lane));
        }
    }
    return merge(accumulators, n, secret);
}

}  // namespace varve::cuda::xxh3
