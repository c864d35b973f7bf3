#pragma once

#include <xxhash.h>
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/image.hpp"

/// The same function with the processor's widest vectors, which some builds of the library have beside it, two to three
/// times faster; its address is null where they do not. Source: xxHash, xxh_x86dispatch.h.
extern "C" [[gnu::weak]] XXH64_hash_t XXH3_64bits_dispatch(void const* data, std::size_t size);

namespace varve::detail {

/// The digest in the file is one of this many bytes of data, made of its chunks' digests. Source: varve/format/README.md, "Digests".
inline constexpr std::size_t granule_bytes = 4u << 20;
inline constexpr std::size_t chunks_per_granule = granule_bytes / digest_chunk_bytes;
inline constexpr std::size_t digest_digits = 16;

/// XXH3-64 with seed 0.
inline std::uint64_t digest(std::span<std::byte const> bytes) noexcept {
    return (XXH3_64bits_dispatch ? XXH3_64bits_dispatch : XXH3_64bits)(bytes.data(), bytes.size());
}

constexpr std::uint64_t chunk_count(std::uint64_t data_bytes) noexcept { return (data_bytes + digest_chunk_bytes - 1) / digest_chunk_bytes; }
constexpr std::uint64_t granule_count(std::uint64_t data_bytes) noexcept { return (data_bytes + granule_bytes - 1) / granule_bytes; }

/// Hashes the chunks of `bytes`, which begins where a chunk begins, into the front of `out`; returns how many there were.
inline std::size_t chunk_digests(std::span<std::byte const> bytes, std::span<std::uint64_t> out) noexcept {
    std::size_t n = 0;
    for (std::size_t at = 0; at < bytes.size(); at += digest_chunk_bytes)
        out[n++] = digest(bytes.subspan(at, std::min(digest_chunk_bytes, bytes.size() - at)));
    return n;
}

/// The digest of one granule from those of its chunks: 8 bytes each, little-endian, in order.
inline std::uint64_t granule_digest(std::span<std::uint64_t const> chunks) noexcept {
    std::array<std::byte, 8 * chunks_per_granule> bytes;
    std::size_t n = 0;
    for (auto d : chunks)
        for (unsigned shift = 0; shift < 64; shift += 8) bytes[n++] = static_cast<std::byte>(d >> shift);
    return digest(std::span(bytes).first(n));
}

/// Appends 16 lower-case hex digits, most significant first.
inline void append_hex(std::string& out, std::uint64_t value) {
    for (int shift = 60; shift >= 0; shift -= 4) out += "0123456789abcdef"[(value >> shift) & 15];
}

inline std::string hex(std::uint64_t value) {
    std::string out;
    append_hex(out, value);
    return out;
}

/// The value of 16 lower-case hex digits, or nothing.
constexpr std::optional<std::uint64_t> parse_hex(std::string_view digits) noexcept {
    if (digits.size() != digest_digits) return std::nullopt;
    std::uint64_t value = 0;
    for (char c : digits) {
        if (c >= '0' && c <= '9')
            value = value << 4 | static_cast<std::uint64_t>(c - '0');
        else if (c >= 'a' && c <= 'f')
            value = value << 4 | static_cast<std::uint64_t>(c - 'a' + 10);
        else
            return std::nullopt;
    }
    return value;
}

/// The metadata `varve.digests` of data with these chunk digests.
inline std::string granule_digests_text(std::span<std::uint64_t const> chunks) {
    std::string out;
    out.reserve((chunks.size() + chunks_per_granule - 1) / chunks_per_granule * digest_digits);
    for (std::size_t i = 0; i < chunks.size(); i += chunks_per_granule)
        append_hex(out, granule_digest(chunks.subspan(i, std::min(chunks_per_granule, chunks.size() - i))));
    return out;
}

/// XXH3-64 with seed 0 over bytes that come in pieces.
class running_digest {
public:
    running_digest() : state_(XXH3_createState()) {
        if (!state_) throw std::bad_alloc();
        XXH3_64bits_reset(state_.get());
    }
    void add(std::span<std::byte const> bytes) noexcept { XXH3_64bits_update(state_.get(), bytes.data(), bytes.size()); }
    std::uint64_t value() const noexcept { return XXH3_64bits_digest(state_.get()); }

private:
    struct free_state {
        void operator()(XXH3_state_t* s) const noexcept { XXH3_freeState(s); }
    };
    std::unique_ptr<XXH3_state_t, free_state> state_;
};

}  // namespace varve::detail
