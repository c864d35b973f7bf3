#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace varve::detail {

/// What safetensors itself allows. Source: safetensors/src/tensor.rs, MAX_HEADER_SIZE.
inline constexpr std::uint64_t max_header_length = 100'000'000;
inline constexpr std::size_t header_prefix_bytes = 8;

/// The keys that belong to varve. Source: varve/format/README.md, "safetensors".
inline constexpr std::string_view reserved_prefix = "varve.";
inline constexpr std::string_view version_key = "varve.version";
inline constexpr std::string_view step_key = "varve.step";
inline constexpr std::string_view sequence_key = "varve.sequence";
inline constexpr std::string_view digests_key = "varve.digests";
inline constexpr std::string_view header_digest_key = "varve.header_digest";
inline constexpr std::string_view aliases_key = "varve.aliases";
inline constexpr std::string_view metadata_section = "__metadata__";

/// A longer string in a header is refused, so that no file makes a reader keep more. The digests of 4 TiB fit.
inline constexpr std::size_t max_header_string_bytes = 16u << 20;
/// Of varve.aliases, which is read whole.
inline constexpr std::size_t max_aliases_bytes = 1u << 20;
/// More dimensions than any tensor library has.
inline constexpr std::size_t max_dimensions = 1024;

}  // namespace varve::detail
