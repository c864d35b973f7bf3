#include "pt_file.hpp"

#include <algorithm>
#include <cstring>
#include <set>
#include <span>
#include <string_view>

#include "varve/detail/safetensors_match.hpp"
#include "varve/detail/safetensors_rules.hpp"
#include "varve/error.hpp"
#include "varve/torch/archive_reader.hpp"
#include "varve/torch/detail/python_layout.hpp"
#include "varve/torch/write_archive.hpp"

namespace varve::tool {

namespace {

namespace archives = libtorch::detail;

/// What the archive's own list of tensors says; archives of others have none.
class archive_checkpoint final : public checkpoint_file {
public:
    explicit archive_checkpoint(file_descriptor fd) : fd_(std::move(fd)) {
        archives::zip_directory const directory(fd_.get());
        file_bytes_ = directory.file_bytes();
        std::set<std::string> names;
        for (auto& t : archives::read_index(fd_.get(), directory)) {
            if (!names.insert(t.name).second) detail::refuse_file("two tensors have the name " + detail::printable(t.name));
            tensors_.push_back({std::move(t.name), t.type, std::move(t.shape), t.size_bytes, t.offset_bytes, tensors_.size()});
            values_.push_back(std::move(t.value));
        }
        auto identity = libtorch::archive_reader{}.identify(fd_.get());
        metadata_ = std::move(identity.metadata);
        metadata_.emplace(detail::step_key, std::to_string(identity.step));
        metadata_.emplace(detail::sequence_key, std::to_string(identity.sequence));
    }

    int fd() const noexcept override { return fd_.get(); }
    std::string_view format_name() const noexcept override { return "torch archive"; }
    std::uint64_t file_bytes() const noexcept override { return file_bytes_; }
    std::vector<file_tensor> const& tensors() const noexcept override { return tensors_; }
    metadata_map const& metadata() const noexcept override { return metadata_; }

    void read(file_tensor const& t, std::uint64_t offset_bytes, std::span<std::byte> to) const override {
        if (t.offset_bytes != 0) return detail::read_exactly(fd_.get(), to.data(), to.size(), t.offset_bytes + offset_bytes);
        auto const& value = values_.at(t.header_index);
        if (value.empty())
            std::fill(to.begin(), to.end(), std::byte{0});
        else
            std::copy_n(value.begin() + static_cast<std::ptrdiff_t>(offset_bytes), to.size(), to.begin());
    }

private:
    file_descriptor fd_;
    std::uint64_t file_bytes_ = 0;
    std::vector<file_tensor> tensors_;
    std::vector<std::vector<std::byte>> values_;  ///< of those that are not records; empty: zeros
    metadata_map metadata_;
};

[[noreturn]] void cannot_rebuild(std::string const& why) {
    throw error(errc::unsupported, "cannot rebuild Python's optimizer state: " + why + "; give --model-only, or a .safetensors output");
}

/// The number between `prefix` and the next dot.
std::string_view group_of(std::string_view name, std::string_view prefix) {
    return name.substr(prefix.size(), name.find('.', prefix.size()) - prefix.size());
}

/// How Python names what a varve checkpoint holds, from the tensors' names and their order, which is that of the state.
archives::python_layout layout_of(state const& s, std::vector<std::string> const& names) {
    constexpr std::string_view optimizer_prefix = "optimizer.", group_prefix = "optimizer.group.";
    archives::python_layout out;
    auto const is_ours = std::any_of(names.begin(), names.end(), [](auto const& n) { return n.starts_with(detail::model_prefix); });
    bool adam = false, sgd = false;
    for (auto const& name : names) {
        if (!is_ours) {
            out.model.emplace_back(name, name);
        } else if (name.starts_with(detail::model_prefix)) {
            out.model.emplace_back(name.substr(detail::model_prefix.size()), name);
        } else if (name.starts_with(group_prefix)) {
            if (group_of(name, group_prefix) != "0")
                cannot_rebuild("it has several parameter groups, and which parameter is in which is not in the file");
            adam = adam || name == "optimizer.group.0.betas.0";
            sgd = sgd || name == "optimizer.group.0.momentum";
        } else if (name.starts_with(optimizer_prefix)) {
            for (std::string_view kept : {".exp_avg", ".momentum_buffer"})
                if (name.ends_with(kept))
                    out.parameters.push_back(name.substr(optimizer_prefix.size(), name.size() - optimizer_prefix.size() - kept.size()));
        }
    }
    for (auto const& [alias, stored] : s.aliases)
        if (alias.starts_with(detail::model_prefix)) out.model.emplace_back(alias.substr(detail::model_prefix.size()), stored);
    if (!adam && !sgd) return out;
    if (out.parameters.empty()) cannot_rebuild("the optimizer keeps nothing for its parameters, so the file does not say which they are");
    archives::python_group group;
    // Python's AdamW sets decoupled_weight_decay itself when it loads.
    group.options = adam ? archives::python_adam_options(false) : archives::python_sgd_options();
    for (std::size_t i = 0; i < out.parameters.size(); ++i) group.parameters.push_back(i);
    out.groups.push_back(std::move(group));
    return out;
}

class file_stream final : public byte_stream {
public:
    explicit file_stream(atomic_file& to) : to_(to) {}
    void write(std::span<std::byte const> bytes) override {
        to_.write(bytes, at_);
        at_ += bytes.size();
    }

private:
    atomic_file& to_;
    std::uint64_t at_ = 0;
};

}  // namespace

std::unique_ptr<file_format> archive_format() { return std::make_unique<libtorch::archive_reader>(); }

std::unique_ptr<checkpoint_file> open_archive(file_descriptor fd) { return std::make_unique<archive_checkpoint>(std::move(fd)); }

void write_archive(state s, checkpoint_file const& from, checkpoint_identity const& identity, atomic_file& to) {
    std::map<std::string_view, file_tensor const*> sources;
    for (auto const& t : from.tensors()) sources.emplace(t.name, &t);
    std::vector<std::vector<std::byte>> memory;
    std::vector<std::string> names;
    state loaded;
    loaded.aliases = s.aliases;
    loaded.layers.resize(2);  // the last is `run`, whose tensors the archive has beside model and optimizer
    for (auto& l : s.layers)
        for (auto& t : l.tensors) {
            auto& bytes = memory.emplace_back(t.size_bytes());
            from.read(*sources.at(t.name), 0, bytes);
            t.data = bytes.data();
            names.push_back(t.name);
            bool const run = t.name.starts_with("rng.") || t.name.starts_with("user.");
            loaded.layers[run ? 1 : 0].tensors.push_back(std::move(t));
        }
    file_stream out(to);
    libtorch::write_archive(loaded, layout_of(loaded, names), {identity.step, identity.sequence, identity.metadata}, out);
}

}  // namespace varve::tool
