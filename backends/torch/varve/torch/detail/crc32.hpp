#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace varve::libtorch::detail {

namespace crc32_tables {

using table = std::array<std::array<std::uint32_t, 256>, 16>;

constexpr table make() noexcept {
    table t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        auto c = i;
        for (int bit = 0; bit < 8; ++bit) c = (c & 1) ? 0xEDB88320u ^ (c >> 1) : c >> 1;
        t[0][i] = c;
    }
    for (std::size_t k = 1; k < 16; ++k)
        for (std::size_t i = 0; i < 256; ++i) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xFF];
    return t;
}

inline constexpr table all = make();

}  // namespace crc32_tables

/// The CRC-32 of zip over bytes that come in pieces: `crc` is that of the bytes before, 0 at first.
/// Slicing by 16, as LibTorch does. Source: M. Kounavis, F. Berry, "A Systematic Approach to Building High Performance
/// Software-Based CRC Generators", 2005.
inline std::uint32_t crc32(std::uint32_t crc, std::span<std::byte const> bytes) noexcept {
    auto const& t = crc32_tables::all;
    auto const* p = bytes.data();
    auto n = bytes.size();
    crc = ~crc;
    for (; n >= 16; p += 16, n -= 16) {
        std::array<std::uint32_t, 4> w;
        std::memcpy(w.data(), p, 16);  // the byte order is little-endian: the archive's header says so too
        w[0] ^= crc;
        crc = 0;
        for (std::size_t k = 0; k < 4; ++k)
            crc ^= t[15 - 4 * k][w[k] & 0xFF] ^ t[14 - 4 * k][(w[k] >> 8) & 0xFF] ^ t[13 - 4 * k][(w[k] >> 16) & 0xFF] ^ t[12 - 4 * k][w[k] >> 24];
    }
    for (; n > 0; ++p, --n) crc = t[0][(crc ^ static_cast<std::uint32_t>(*p)) & 0xFF] ^ (crc >> 8);
    return ~crc;
}

}  // namespace varve::libtorch::detail
