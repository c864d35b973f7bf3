#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "varve/detail/safetensors_match.hpp"
#include "varve/state.hpp"
#include "varve/torch/detail/crc32.hpp"
#include "varve/torch/detail/zip_reader.hpp"

namespace varve::libtorch::detail {

/// Every record's name begins with it, as torch.save has it.
inline constexpr std::string_view archive_folder = "archive/";
inline constexpr std::string_view digest_record = "archive/varve/digest";
inline constexpr std::string_view index_record = "archive/varve/tensors";
inline constexpr std::string_view step_record = "archive/varve/step";
inline constexpr std::string_view sequence_record = "archive/varve/sequence";
inline constexpr std::string_view metadata_record = "archive/varve/metadata";

inline constexpr std::uint64_t max_text_record_bytes = 16u << 20;

/// A state's tensor as the archive has it. The index (`varve/tensors`) is a JSON list of [name, dtype, shape, where]: where is a
/// record's name, or the bytes themselves in hex behind a `=` (scalars, which Python has as numbers), or empty (zeros).
struct indexed_tensor {
    std::string name;
    varve::dtype type = dtype::F32;
    std::vector<std::int64_t> shape;
    std::string where;
};

/// A record of varve's own, against its checksum: what it says is believed before the digest is known to fit.
inline std::string text_record(int fd, zip_directory const& directory, std::string_view name) {
    auto const* r = directory.find(name);
    if (!r) throw error(errc::not_whole, "not a whole checkpoint: it has no record " + std::string(name.substr(archive_folder.size())));
    if (r->size_bytes > max_text_record_bytes) refuse_file("its record " + std::string(name) + " is larger than 16 MiB");
    auto text = read_text(fd, data_offset(*r), r->size_bytes);
    if (crc32(0, std::as_bytes(std::span(text.data(), text.size()))) != r->crc)
        throw error(errc::not_whole, "not a whole checkpoint: broken record " + std::string(name.substr(archive_folder.size())));
    return text;
}

/// Throws errc::malformed for an index that breaks the rules above.
inline std::vector<indexed_tensor> parse_index(std::string const& text) {
    auto const json = nlohmann::json::parse(text, nullptr, false);
    auto refuse = [] { refuse_file("its record varve/tensors is not a list of tensors"); };
    if (!json.is_array()) refuse();
    std::vector<indexed_tensor> out;
    out.reserve(json.size());
    for (auto const& e : json) {
        if (!e.is_array() || e.size() != 4 || !e[0].is_string() || !e[1].is_string() || !e[2].is_array() || !e[3].is_string()) refuse();
        auto type = dtype_from_name(e[1].get_ref<std::string const&>());
        if (!type || e[2].size() > varve::detail::max_dimensions) refuse();
        indexed_tensor t{e[0].get<std::string>(), *type, {}, e[3].get<std::string>()};
        for (auto const& d : e[2]) {
            if (!d.is_number_unsigned() || d.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) refuse();
            t.shape.push_back(static_cast<std::int64_t>(d.get<std::uint64_t>()));
        }
        out.push_back(std::move(t));
    }
    return out;
}

inline std::string hex_bytes(std::span<std::byte const> bytes) {
    std::string out;
    for (auto b : bytes) {
        out += "0123456789abcdef"[static_cast<unsigned>(b) >> 4];
        out += "0123456789abcdef"[static_cast<unsigned>(b) & 15];
    }
    return out;
}

/// The bytes of hex digits, exactly `size`.
inline std::vector<std::byte> bytes_from_hex(std::string_view digits, std::uint64_t size) {
    auto value = [](char c) -> unsigned { return c >= '0' && c <= '9' ? unsigned(c - '0') : c >= 'a' && c <= 'f' ? unsigned(c - 'a' + 10) : 16u; };
    if (digits.size() % 2 != 0 || digits.size() / 2 != size) refuse_file("its record varve/tensors has a value of a wrong size");
    std::vector<std::byte> out;
    for (std::size_t i = 0; i < digits.size(); i += 2) {
        auto high = value(digits[i]), low = value(digits[i + 1]);
        if (high > 15 || low > 15) refuse_file("its record varve/tensors has a value that is not in hex digits");
        out.push_back(static_cast<std::byte>(high << 4 | low));
    }
    return out;
}

/// What of an archive goes where in a state.
struct archive_match {
    struct value {
        tensor const* target;
        std::vector<std::byte> bytes;
    };
    std::vector<varve::detail::restored_tensor> from_records;  ///< sorted; `begin` is the offset in the file
    std::vector<value> values;
    std::vector<tensor const*> zeros;
};

/// Throws errc::mismatch naming the first difference.
inline archive_match match_archive(int fd, zip_directory const& directory, state const& s, bool model_only) {
    using varve::detail::describe;
    using varve::detail::printable;
    using varve::detail::refuse_match;
    auto counts = [&](std::string_view name) { return !model_only || name.starts_with(varve::detail::model_prefix); };
    std::unordered_map<std::string_view, tensor const*> wanted;
    for (auto const& l : s.layers)
        for (auto const& t : l.tensors)
            if (counts(t.name)) wanted.emplace(t.name, &t);
    std::unordered_map<std::string_view, zip_record const*> records;
    for (auto const& r : directory.records()) records.emplace(r.name, &r);
    archive_match out;
    for (auto const& e : parse_index(text_record(fd, directory, index_record))) {
        if (!counts(e.name)) continue;
        auto found = wanted.find(e.name);
        if (found == wanted.end())
            refuse_match("it has the tensor " + printable(e.name) + ", and the state has none of that name, or it has it twice");
        auto const& t = *found->second;
        wanted.erase(found);
        if (t.type != e.type || t.shape != e.shape)
            refuse_match("its tensor " + printable(e.name) + " is " + describe(e.type, e.shape) + ", and the state's is " +
                         describe(t.type, t.shape));
        if (e.where.empty()) {
            out.zeros.push_back(&t);
        } else if (e.where.front() == '=') {
            out.values.push_back({&t, bytes_from_hex(std::string_view(e.where).substr(1), t.size_bytes())});
        } else {
            auto record = records.find(std::string(archive_folder) + e.where);
            if (record == records.end() || record->second->size_bytes != t.size_bytes())
                refuse_file("the tensor " + printable(e.name) + " has no record of its size");
            out.from_records.push_back({data_offset(*record->second), &t});
        }
    }
    if (!wanted.empty()) refuse_match("it lacks the tensor " + printable(wanted.begin()->first));
    std::sort(out.from_records.begin(), out.from_records.end(), [](auto const& a, auto const& b) { return a.begin < b.begin; });
    return out;
}

}  // namespace varve::libtorch::detail
