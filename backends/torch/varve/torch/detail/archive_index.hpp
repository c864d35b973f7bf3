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
#include <unordered_set>
#include <utility>
#include <vector>

#include "varve/detail/safetensors_match.hpp"
#include "varve/state.hpp"
#include "varve/torch/detail/crc32.hpp"
#include "varve/torch/detail/zip_reader.hpp"

namespace varve::libtorch::detail {

/// Every record's name begins with it, as torch.save has it.
inline constexpr std::string_view archive_folder = "archive/";
/// Behind that, the records of tensors' bytes.
inline constexpr std::string_view data_folder = "data/";
inline constexpr std::string_view digest_record = "archive/varve/digest";
inline constexpr std::string_view index_record = "archive/varve/tensors";
inline constexpr std::string_view step_record = "archive/varve/step";
inline constexpr std::string_view sequence_record = "archive/varve/sequence";
inline constexpr std::string_view metadata_record = "archive/varve/metadata";

/// Of the records that say something about the others; with no more in the index, the central directory stays below its limit.
inline constexpr std::uint64_t max_text_record_bytes = 16u << 20;

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

/// Whether brackets stand in more than `most` others. A parser takes a hundred bytes for each of them.
inline bool nests_deeper(std::string_view json, int most) {
    bool in_string = false;
    int depth = 0;
    for (std::size_t i = 0; i < json.size(); ++i) {
        char const c = json[i];
        if (in_string) {
            if (c == '\\') ++i;
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > most) return true;
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
    return false;
}

/// A record of JSON; discarded where it is none, or has more than `depth` levels.
inline nlohmann::json json_record(int fd, zip_directory const& directory, std::string_view name, int depth) {
    auto const text = text_record(fd, directory, name);
    return nests_deeper(text, depth) ? nlohmann::json(nlohmann::json::value_t::discarded) : nlohmann::json::parse(text, nullptr, false);
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

/// A state's tensor as the archive has it.
struct indexed_tensor {
    std::string name;
    varve::dtype type = dtype::F32;
    std::vector<std::int64_t> shape;
    std::uint64_t size_bytes = 0;
    std::uint64_t offset_bytes = 0;  ///< of its bytes in the file, where they are a record; else 0
    std::vector<std::byte> value;    ///< its bytes, where the index has them; zeros where neither is there
};

/// The index (`varve/tensors`): a JSON list of [name, dtype, shape, where]. Where is the name of a record below `data/`, no two
/// tensors' the same, or the bytes themselves in hex behind a `=` (scalars, which Python has as numbers), or empty (zeros, of no more
/// bytes in all than the file has: a parameter's momentum before the first update). Throws errc::malformed for one that breaks these rules.
inline std::vector<indexed_tensor> read_index(int fd, zip_directory const& directory) {
    auto const json = json_record(fd, directory, index_record, 3);
    auto refuse = [] { refuse_file("its record varve/tensors is not a list of tensors"); };
    if (!json.is_array()) refuse();
    std::vector<indexed_tensor> out;
    std::unordered_set<zip_record const*> taken;
    auto zeros_left = directory.file_bytes();
    for (auto const& e : json) {
        if (!e.is_array() || e.size() != 4 || !e[0].is_string() || !e[1].is_string() || !e[2].is_array() || !e[3].is_string()) refuse();
        auto type = dtype_from_name(e[1].get_ref<std::string const&>());
        if (!type || e[2].size() > varve::detail::max_dimensions) refuse();
        indexed_tensor t{e[0].get<std::string>(), *type, {}, element_bytes(*type), 0, {}};
        auto refuse_tensor = [&](char const* what) { refuse_file("the tensor " + varve::detail::printable(t.name) + what); };
        for (auto const& d : e[2]) {
            if (!d.is_number_unsigned() || d.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) refuse();
            t.shape.push_back(static_cast<std::int64_t>(d.get<std::uint64_t>()));
            if (__builtin_mul_overflow(t.size_bytes, d.get<std::uint64_t>(), &t.size_bytes)) refuse_tensor(" has an impossible shape");
        }
        auto const& where = e[3].get_ref<std::string const&>();
        if (where.starts_with('=')) {
            t.value = bytes_from_hex(std::string_view(where).substr(1), t.size_bytes);
        } else if (!where.empty()) {
            auto const* record = where.starts_with(data_folder) ? directory.find(std::string(archive_folder) + where) : nullptr;
            if (!record || record->size_bytes != t.size_bytes) refuse_tensor(" has no record of its size");
            if (!taken.insert(record).second) refuse_tensor(" has the record of another");
            t.offset_bytes = data_offset(*record);
        } else if (t.size_bytes > zeros_left) {
            refuse_tensor(" would be zeros, more of them than the file has bytes");
        } else {
            zeros_left -= t.size_bytes;
        }
        out.push_back(std::move(t));
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
    archive_match out;
    for (auto& e : read_index(fd, directory)) {
        if (!counts(e.name)) continue;
        auto found = wanted.find(e.name);
        if (found == wanted.end())
            refuse_match("it has the tensor " + printable(e.name) + ", and the state has none of that name, or it has it twice");
        auto const& t = *found->second;
        wanted.erase(found);
        if (t.type != e.type || t.shape != e.shape)
            refuse_match("its tensor " + printable(e.name) + " is " + describe(e.type, e.shape) + ", and the state's is " +
                         describe(t.type, t.shape));
        if (e.offset_bytes != 0)
            out.from_records.push_back({e.offset_bytes, &t});
        else if (!e.value.empty())
            out.values.push_back({&t, std::move(e.value)});
        else
            out.zeros.push_back(&t);
    }
    if (!wanted.empty()) refuse_match("it lacks the tensor " + printable(wanted.begin()->first));
    std::sort(out.from_records.begin(), out.from_records.end(), [](auto const& a, auto const& b) { return a.begin < b.begin; });
    return out;
}

}  // namespace varve::libtorch::detail
