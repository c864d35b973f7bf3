#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/safetensors_rules.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"
#include "varve/version.hpp"

namespace varve::detail {

[[noreturn]] inline void refuse_argument(std::string const& line) { throw error(std::make_error_code(std::errc::invalid_argument), line); }

/// Throws std::errc::invalid_argument unless the tensors can stand in a safetensors file.
inline void expect_storable(state const& s) {
    std::unordered_set<std::string_view> names;
    auto take = [&](std::string const& name) {
        if (name.size() > max_header_string_bytes / 6) refuse_argument("a tensor has a name of " + std::to_string(name.size()) + " bytes");
        if (!is_utf8(name)) refuse_argument("the tensor name " + printable(name) + " is not UTF-8");
        if (name == metadata_section) refuse_argument("no tensor can be called __metadata__: safetensors keeps that name");
        if (!names.insert(name).second) refuse_argument("two tensors are called " + printable(name));
    };
    std::uint64_t total = 0;
    for (auto const& l : s.layers)
        for (auto const& t : l.tensors) {
            take(t.name);
            if (t.shape.size() > max_dimensions) refuse_argument("the tensor " + printable(t.name) + " has more than 1,024 dimensions");
            std::uint64_t bytes = element_bytes(t.type);
            for (auto d : t.shape)
                if (d < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(d), &bytes))
                    refuse_argument("the tensor " + printable(t.name) + " has an impossible shape");
            if (__builtin_add_overflow(total, bytes, &total) || total > std::numeric_limits<std::int64_t>::max() / 2)
                refuse_argument("the tensors are larger than any file");
            if (!t.strides.empty() && t.strides.size() != t.shape.size())
                refuse_argument("the tensor " + printable(t.name) + " has strides for another number of dimensions");
        }
    for (auto const& [alias, name] : s.aliases) {
        if (!names.contains(name)) refuse_argument("the alias " + printable(alias) + " stands for " + printable(name) + ", which is no tensor");
        take(alias);
    }
}

/// Tensors in the order of the file, offsets from the start of the data. Layers in order; within one by descending
/// element size; those whose bytes are not a multiple of 8 at the very end, by descending element size: so every tensor
/// is aligned for its dtype.
inline std::vector<placed_tensor> place_tensors(state const& s) {
    std::vector<placed_tensor> placed;
    std::vector<placed_tensor> last;
    auto size_of_element = [&](placed_tensor const& p) { return element_bytes(s.layers[p.layer].tensors[p.tensor].type); };
    auto by_element_size = [&](placed_tensor const& a, placed_tensor const& b) { return size_of_element(a) > size_of_element(b); };
    for (std::size_t l = 0; l < s.layers.size(); ++l) {
        auto first = placed.size();
        for (std::size_t t = 0; t < s.layers[l].tensors.size(); ++t) {
            auto bytes = s.layers[l].tensors[t].size_bytes();
            (bytes % 8 == 0 ? placed : last).push_back({l, t, 0, bytes});
        }
        std::stable_sort(placed.begin() + static_cast<std::ptrdiff_t>(first), placed.end(), by_element_size);
    }
    std::stable_sort(last.begin(), last.end(), by_element_size);
    placed.insert(placed.end(), last.begin(), last.end());
    std::uint64_t at = 0;
    for (auto& p : placed) {
        p.offset_bytes = at;
        at += p.size_bytes;
    }
    return placed;
}

inline void append_pair(std::string& out, std::string_view key, std::string_view value) {
    append_json_string(out, key);
    out += ':';
    append_json_string(out, value);
}

/// The user's metadata as it stands in the header, each pair with the comma before it.
/// Throws std::errc::invalid_argument for keys of varve's own and what is not UTF-8.
inline std::string user_metadata_text(metadata_map const& metadata) {
    std::string out;
    for (auto const& [key, value] : metadata) {
        if (key.starts_with(reserved_prefix)) refuse_argument("the metadata key " + printable(key) + " begins with varve., which belongs to varve");
        if (!is_utf8(key) || !is_utf8(value)) refuse_argument("the metadata of the key " + printable(key) + " is not UTF-8");
        out += ',';
        auto const before = out.size();
        append_pair(out, key, value);
        if (out.size() - before > max_header_string_bytes)
            refuse_argument("the metadata of the key " + printable(key) + " takes more than 16 MiB, the most that varve reads");
    }
    return out;
}

inline std::string aliases_text(std::map<std::string, std::string> const& aliases) {
    std::string out = "{";
    for (auto const& [alias, name] : aliases) {
        if (out.size() > 1) out += ',';
        append_pair(out, alias, name);
    }
    return out += '}';
}

/// The header's JSON, and where in it the 16 digits of its own digest stand (as zeros).
struct header_text {
    std::string json;
    std::size_t own_digest = 0;
};

/// The tensors' entries stand in the order of the state, which the order of their bytes does not keep: whoever rebuilds
/// an optimizer's list of parameters from a file needs it. `data_offset` is where the offsets of `tensors` count from.
inline header_text compose_header(state const& s, std::span<placed_tensor const> tensors, std::uint64_t data_offset, commit_values const& values,
                                  std::string_view digests) {
    header_text out;
    auto& json = out.json;
    json = "{\"__metadata__\":{";
    append_pair(json, version_key, VARVE_VERSION);
    json += ',';
    append_pair(json, step_key, std::to_string(values.step));
    json += ',';
    append_pair(json, sequence_key, std::to_string(values.sequence));
    json += ',';
    append_pair(json, header_digest_key, std::string(digest_digits, '0'));
    out.own_digest = json.size() - 1 - digest_digits;
    json += ',';
    append_pair(json, digests_key, digests);
    if (!s.aliases.empty()) {
        json += ',';
        append_pair(json, aliases_key, aliases_text(s.aliases));
    }
    json += user_metadata_text(values.metadata);
    json += '}';
    std::vector<placed_tensor> in_order(tensors.begin(), tensors.end());
    std::sort(in_order.begin(), in_order.end(),
              [](auto const& a, auto const& b) { return std::pair(a.layer, a.tensor) < std::pair(b.layer, b.tensor); });
    for (auto const& p : in_order) {
        auto const& t = s.layers[p.layer].tensors[p.tensor];
        auto begin = p.offset_bytes - data_offset;
        json += ',';
        append_json_string(json, t.name);
        json += ":{\"dtype\":\"";
        json += name(t.type);
        json += "\",\"shape\":[";
        for (std::size_t d = 0; d < t.shape.size(); ++d) {
            if (d > 0) json += ',';
            json += std::to_string(t.shape[d]);
        }
        json += "],\"data_offsets\":[" + std::to_string(begin) + ',' + std::to_string(begin + p.size_bytes) + "]}";
    }
    json += '}';
    return out;
}

/// The image of a state whose header has room for `metadata_bytes` of the user's metadata.
inline image lay_out_safetensors(state const& s, std::uint64_t metadata_bytes) {
    expect_storable(s);
    image out;
    out.tensors = place_tensors(s);
    auto data_bytes = out.tensors.empty() ? 0 : out.tensors.back().offset_bytes + out.tensors.back().size_bytes;
    constexpr auto largest = std::numeric_limits<std::uint64_t>::max();
    std::string const digests(granule_count(data_bytes) * digest_digits, '0');
    auto room = header_prefix_bytes + compose_header(s, out.tensors, 0, {largest, largest, {}}, digests).json.size() + metadata_bytes;
    // The format asks for a multiple of 4,096. A multiple of the digests' chunk costs at most 60 KiB more and makes every
    // block, which begins at a multiple of 4 MiB of the file, begin where a chunk begins: no chunk lies in two blocks.
    out.header_bytes = (room + digest_chunk_bytes - 1) / digest_chunk_bytes * digest_chunk_bytes;
    if (out.header_bytes - header_prefix_bytes > max_header_length || digests.size() > max_header_string_bytes)
        refuse_argument("the names and digests of this state need a header of " + std::to_string(out.header_bytes) +
                        " bytes; safetensors allows 100,000,000, and 16 MiB of digests are the most that varve reads");
    if (aliases_text(s.aliases).size() > max_aliases_bytes)
        refuse_argument("the other names of tied tensors take more than 1 MiB, the most that varve reads");
    out.size_bytes = out.header_bytes + data_bytes;
    for (auto& p : out.tensors) p.offset_bytes += out.header_bytes;
    return out;
}

/// Exactly header_bytes bytes: length, JSON, spaces.
inline std::vector<std::byte> safetensors_header(state const& s, image const& img, commit_values const& values,
                                                 std::span<std::uint64_t const> chunk_digests) {
    if (chunk_digests.size() != chunk_count(img.data_bytes()))
        refuse_argument("a header needs the digests of " + std::to_string(chunk_count(img.data_bytes())) + " chunks and got " +
                        std::to_string(chunk_digests.size()));
    auto text = compose_header(s, img.tensors, img.header_bytes, values, granule_digests_text(chunk_digests));
    auto length = img.header_bytes - header_prefix_bytes;
    if (text.json.size() > length) throw error(errc::metadata_too_large);
    std::vector<std::byte> out(img.header_bytes, static_cast<std::byte>(' '));
    for (unsigned i = 0; i < header_prefix_bytes; ++i) out[i] = static_cast<std::byte>(length >> 8 * i);
    std::memcpy(out.data() + header_prefix_bytes, text.json.data(), text.json.size());
    auto own = hex(digest(out));
    std::memcpy(out.data() + header_prefix_bytes + text.own_digest, own.data(), own.size());
    return out;
}

}  // namespace varve::detail
