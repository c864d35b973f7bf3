#pragma once

#include <cstdint>
#include <filesystem>
#include <iosfwd>

#include <nlohmann/json.hpp>

namespace varve::tool {

/// Measures what a folder can take, leaving nothing behind, and answers with the probe's object: `direct`, `sinks`, `copies`,
/// `digest_gb_per_s`. `size_bytes` is the file's size, a multiple of 4 MiB. A line of progress for each part goes to `progress`
/// unless it is null. Throws varve::error, one line, where the folder cannot be written.
nlohmann::json measure_limits(std::filesystem::path const& dir, std::uint64_t size_bytes, std::ostream* progress = nullptr);

}  // namespace varve::tool
