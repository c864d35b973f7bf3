#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/detail/digest.hpp"
#include "varve/detail/safetensors_header.hpp"

namespace varve::detail {

/// What a first walk through a header finds, in memory that the file's size bounds: its structure is whole, and what
/// varve's own metadata says.
struct safetensors_outline {
    safetensors_extent extent;
    std::uint64_t tensor_count = 0;
    std::optional<std::string> step;
    std::optional<std::string> sequence;
    std::optional<std::string> digests;
    std::optional<std::string> header_digest;
    std::optional<std::string> aliases;
    std::uint64_t header_digest_offset = 0;  ///< of its digits in the file
};

/// Keeps a pair of metadata that is the user's and not varve's own.
inline void keep_users(metadata_map& out, std::string const& key, std::string const& value) {
    if (!key.starts_with(reserved_prefix)) out.emplace(key, value);
}

/// Keeps 24 bytes a tensor and 8 a metadata key, both less than their text in the header; in deques, since a vector
/// that grows holds its bytes up to three times.
class outline_visitor {
public:
    explicit outline_visitor(safetensors_outline& out) : out_(out) {}

    void tensor(header_entry const& e) {
        ranges_.push_back({e.begin, e.end});
        names_.push_back(hash(e.name));
    }

    void metadata(std::string const& key, std::string const& value, std::uint64_t end_offset) {
        keys_.push_back(hash(key));
        if (key == step_key) out_.step = value;
        if (key == sequence_key) out_.sequence = value;
        if (key == digests_key) out_.digests = value;
        if (key == aliases_key) out_.aliases = value;
        if (key == header_digest_key) {
            out_.header_digest = value;
            out_.header_digest_offset = end_offset - 1 - digest_digits;
        }
    }

    /// Gapless from 0 to the end of the file; no name twice.
    void finish() {
        out_.tensor_count = ranges_.size();
        std::sort(ranges_.begin(), ranges_.end());
        std::uint64_t at = 0;
        for (auto const& r : ranges_) {
            if (r.first != at) refuse_file("its tensors leave a gap or overlap at byte " + std::to_string(std::min(at, r.first)) + " of the data");
            at = r.second;
        }
        if (at != out_.extent.data_bytes())
            refuse_file("its tensors take " + std::to_string(at) + " bytes and the file has " + std::to_string(out_.extent.data_bytes()) +
                        " of data");
        expect_unique(names_, "two tensors have the same name");
        expect_unique(keys_, "a key of the metadata stands there twice");
    }

private:
    static std::uint64_t hash(std::string_view text) noexcept { return digest(std::as_bytes(std::span(text))); }

    static void expect_unique(std::deque<std::uint64_t>& hashes, char const* otherwise) {
        std::sort(hashes.begin(), hashes.end());
        if (std::adjacent_find(hashes.begin(), hashes.end()) != hashes.end()) refuse_file(otherwise);
    }

    safetensors_outline& out_;
    std::deque<std::pair<std::uint64_t, std::uint64_t>> ranges_;
    std::deque<std::uint64_t> names_;
    std::deque<std::uint64_t> keys_;
};

/// Checks the structure of a file; throws errc::malformed. A refused file costs no more memory than its size plus a constant.
inline safetensors_outline read_outline(int fd) {
    safetensors_outline out;
    out.extent = read_extent(fd);
    outline_visitor visitor(out);
    visit_header(fd, out.extent, visitor);
    visitor.finish();
    return out;
}

[[noreturn]] inline void refuse_as_not_whole(std::string const& why) { throw error(errc::not_whole, "not a whole checkpoint: " + why); }

/// XXH3-64 of header and length with the header digest's own digits as zeros.
inline std::uint64_t digest_of_header(int fd, safetensors_outline const& outline) {
    running_digest sum;
    std::vector<std::byte> buffer(64u << 10);
    auto own = outline.header_digest_offset;
    for (std::uint64_t at = 0; at < outline.extent.data_offset;) {
        auto n = static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), outline.extent.data_offset - at));
        read_exactly(fd, buffer.data(), n, at);
        for (std::size_t i = 0; i < digest_digits; ++i)
            if (own + i >= at && own + i < at + n) buffer[own + i - at] = static_cast<std::byte>('0');
        sum.add(std::span(buffer).first(n));
        at += n;
    }
    return sum.value();
}

/// Throws errc::not_whole unless both digests are there, fit the size of the data, and the header's fits the header.
inline void expect_whole_header(int fd, safetensors_outline const& outline) {
    for (auto const& [key, value] : {std::pair(digests_key, &outline.digests), std::pair(header_digest_key, &outline.header_digest)})
        if (!*value) refuse_as_not_whole("its metadata has no " + std::string(key));
    auto expected = parse_hex(*outline.header_digest);
    if (!expected || *expected != digest_of_header(fd, outline)) refuse_as_not_whole("its header does not fit " + std::string(header_digest_key));
    std::string_view digests = *outline.digests;
    bool well_formed = digests.size() == granule_count(outline.extent.data_bytes()) * digest_digits;
    for (std::size_t i = 0; well_formed && i < digests.size(); i += digest_digits)
        well_formed = parse_hex(digests.substr(i, digest_digits)).has_value();
    if (!well_formed) refuse_as_not_whole(std::string(digests_key) + " does not have one digest for each 4 MiB of data");
}

/// A count that stands as decimal digits in the metadata; throws errc::malformed.
inline std::uint64_t parse_count(std::optional<std::string> const& text, std::string_view key) {
    std::uint64_t value = 0;
    auto const* end = text ? text->data() + text->size() : nullptr;
    if (!text || text->empty() || std::from_chars(text->data(), end, value).ptr != end || text->size() > 20 ||
        (text->size() > 1 && text->front() == '0') || std::to_string(value) != *text)
        refuse_file("its metadata has no count as " + std::string(key));
    return value;
}

}  // namespace varve::detail
