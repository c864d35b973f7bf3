#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "varve/detail/safetensors_outline.hpp"
#include "varve/state.hpp"

namespace varve::detail {

inline constexpr std::string_view model_prefix = "model.";

/// A state's tensor and where the file's data has its bytes.
struct restored_tensor {
    std::uint64_t begin = 0;
    tensor const* target = nullptr;
    std::uint64_t end() const noexcept { return begin + target->size_bytes(); }
};

inline std::string describe(dtype type, std::span<std::int64_t const> shape) {
    std::string out(name(type));
    out += " [";
    for (std::size_t i = 0; i < shape.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

[[noreturn]] inline void refuse_match(std::string const& why) {
    throw error(errc::mismatch, "the checkpoint is of another model or optimizer: " + why);
}

/// Finds the state's tensors in a file; memory for the state's tensors only.
///
/// A tensor that the file has under another of its names (tied parameters) is found through the aliases of either
/// side. Where a file has a tied parameter under several names, the one that the state stores it under counts.
class match_visitor {
public:
    /// `users` gets the user's metadata, if it is not null.
    match_visitor(state const& s, safetensors_outline const& outline, bool model_only, metadata_map* users)
        : outline_(outline), model_only_(model_only), users_(users) {
        for (auto const& l : s.layers)
            for (auto const& t : l.tensors)
                if (counts(t.name)) tensors_.emplace(t.name, slot{&t, std::nullopt, false});
        for (auto const& [alias, name] : s.aliases)
            if (counts(alias)) aliases_.emplace(alias, name);
        if (outline.aliases) read_aliases(*outline.aliases);
    }

    void tensor(header_entry const& e) {
        if (!counts(e.name)) return;
        auto found = tensors_.find(e.name);
        bool by_own_name = found != tensors_.end();
        if (!by_own_name)
            if (auto alias = aliases_.find(e.name); alias != aliases_.end()) found = tensors_.find(alias->second);
        if (found == tensors_.end()) {
            if (auto range = other_names_.equal_range(std::string(e.name)); range.first != range.second) {
                for (auto it = range.first; it != range.second; ++it) take(tensors_.find(it->second)->second, e, false);
                return;
            }
            refuse_match("it has the tensor " + printable(e.name) + ", and the state has none of that name");
        }
        take(found->second, e, by_own_name);
    }
    void metadata(std::string const& key, std::string const& value, std::uint64_t) {
        if (users_) keep_users(*users_, key, value);
    }

    /// In the order of the file. Throws errc::mismatch where a tensor of the state was not met.
    std::vector<restored_tensor> finish(state const& s) const {
        std::vector<restored_tensor> out;
        for (auto const& l : s.layers)
            for (auto const& t : l.tensors) {
                if (!counts(t.name)) continue;
                auto const& found = tensors_.find(t.name)->second;
                if (!found.begin) refuse_match("it lacks the tensor " + printable(t.name));
                out.push_back({*found.begin, &t});
            }
        std::sort(out.begin(), out.end(), [](auto const& a, auto const& b) { return std::pair(a.begin, a.end()) < std::pair(b.begin, b.end()); });
        return out;
    }

private:
    struct slot {
        varve::tensor const* target;
        std::optional<std::uint64_t> begin;
        bool by_own_name;
    };

    bool counts(std::string_view name) const noexcept { return !model_only_ || name.starts_with(model_prefix); }

    /// Notes, for each stored name of the file that is no tensor of the state, which of its other names are.
    void read_aliases(std::string const& text) {
        auto parsed = text.size() <= max_aliases_bytes ? nlohmann::json::parse(text, nullptr, false) : nlohmann::json();
        if (!parsed.is_object()) refuse_file("its metadata varve.aliases is no JSON object, or longer than 1 MiB");
        for (auto const& [alias, stored] : parsed.items()) {
            if (!stored.is_string()) refuse_file("its metadata varve.aliases has something else than names");
            auto const& stored_name = stored.template get_ref<std::string const&>();
            if (!tensors_.contains(stored_name) && tensors_.contains(alias)) other_names_.emplace(stored_name, alias);
        }
    }

    void take(slot& s, header_entry const& e, bool by_own_name) const {
        auto const& t = *s.target;
        if (t.type != e.type || !std::equal(t.shape.begin(), t.shape.end(), e.shape.begin(), e.shape.end()))
            refuse_match("its tensor " + printable(e.name) + " is " + describe(e.type, e.shape) + ", and the state's is " +
                         describe(t.type, t.shape));
        // The file may have changed since its structure was checked.
        if (e.end > outline_.extent.data_bytes()) refuse_file("it changed while it was read");
        if (s.by_own_name) return;
        s.begin = e.begin;
        s.by_own_name = by_own_name;
    }

    safetensors_outline const& outline_;
    bool model_only_;
    metadata_map* users_;
    std::unordered_map<std::string_view, slot> tensors_;
    std::unordered_map<std::string_view, std::string_view> aliases_;
    std::unordered_multimap<std::string, std::string> other_names_;
};

/// Where the file has the state's tensors, sorted by offset; throws errc::mismatch naming the first difference. `users` gets the
/// user's metadata, if it is not null.
inline std::vector<restored_tensor> match_state(int fd, safetensors_outline const& outline, state const& s, bool model_only,
                                                metadata_map* users = nullptr) {
    match_visitor visitor(s, outline, model_only, users);
    visit_header(fd, outline.extent, visitor);
    return visitor.finish(s);
}

}  // namespace varve::detail
