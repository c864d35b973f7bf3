#include "varve/torch/archive.hpp"

#include <bit>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "varve/detail/text.hpp"
#include "varve/torch/detail/archive_index.hpp"
#include "varve/torch/detail/pickle.hpp"
#include "varve/torch/detail/zip_writer.hpp"
#include "varve/torch/write_archive.hpp"

namespace varve::libtorch {

namespace {

using detail::python_option;

std::error_code invalid() { return std::make_error_code(std::errc::invalid_argument); }

/// The archive of one save: first the pickle, which numbers the records, then their bytes.
class writer {
public:
    writer(state const& s, detail::python_layout const& layout, commit_values const& values, device_memory* device)
        : state_(s), layout_(layout), values_(values), device_(device) {
        for (auto const& l : s.layers)
            for (auto const& t : l.tensors) {
                varve::detail::expect_reachable(t, device, "the torch archive cannot write ");
                if (!varve::detail::is_utf8(t.name)) throw error(invalid(), "the name " + varve::detail::printable(t.name) + " is not UTF-8");
                tensors_.emplace(t.name, &t);
            }
        for (auto const& [key, value] : values.metadata)
            if (key.starts_with("varve.") || !varve::detail::is_utf8(key) || !varve::detail::is_utf8(value))
                throw error(invalid(), "the metadata key " + varve::detail::printable(key) + " begins with varve. or is not UTF-8");
    }

    void write(byte_stream& out) {
        auto const pickle = pickled();
        auto const index = index_text();
        auto const metadata = nlohmann::json(values_.metadata).dump();
        expect_readable(index, "names and shapes of its tensors");
        expect_readable(metadata, "metadata");
        if (device_) {
            std::vector<tensor const*> on_device;
            for (auto const& r : records_)
                if (r.source && r.source->memory == memory_kind::device) on_device.push_back(r.source);
            on_device_ = device_->read(std::move(on_device));
        }
        detail::zip_writer zip(out);
        auto named = [](std::string_view name) { return std::string(detail::archive_folder) += name; };
        zip.record(named("data.pkl"), pickle);
        zip.record(named("byteorder"), "little");
        for (std::size_t i = 0; i < records_.size(); ++i) {
            auto const& r = records_[i];
            zip.begin(named(record_name(i)), r.source ? r.source->size_bytes() : sizeof(float));
            if (!r.source)
                zip.add(std::as_bytes(std::span(&r.step, 1)));
            else
                add(zip, *r.source);
            zip.end();
        }
        zip.record(named("version"), "3\n");
        zip.record(std::string(detail::step_record), std::to_string(values_.step));
        zip.record(std::string(detail::sequence_record), std::to_string(values_.sequence));
        zip.record(std::string(detail::metadata_record), metadata);
        zip.record(std::string(detail::index_record), index);
        zip.record(std::string(detail::digest_record), varve::detail::hex(zip.digest()));
        zip.finish();
    }

private:
    /// The bytes of `data/<i>`: a tensor of the state, or a step count as Python has it.
    struct record {
        tensor const* source = nullptr;
        float step = 0;
    };

    static std::string record_name(std::size_t index) { return std::string(detail::data_folder) + std::to_string(index); }

    /// What the reader would refuse is refused before a byte is written.
    static void expect_readable(std::string const& record, char const* what) {
        if (record.size() > detail::max_text_record_bytes)
            throw error(invalid(), "the torch archive has no room for the " + std::string(what) + ": " + std::to_string(record.size()) +
                                       " bytes of at most " + std::to_string(detail::max_text_record_bytes));
    }

    tensor const* find(std::string const& name) const {
        auto it = tensors_.find(name);
        return it == tensors_.end() ? nullptr : it->second;
    }
    tensor const& at(std::string const& name) const {
        if (auto const* t = find(name)) return *t;
        throw error(invalid(), "the state has no tensor " + name + ": it is not the training state's that the archive was made for");
    }
    /// Of a tensor that is to be one number; a state that was read from a file may have anything by that name.
    template <class T>
    static T value(tensor const& t) {
        T v;
        if (t.size_bytes() != sizeof v) throw error(invalid(), varve::detail::printable(t.name) + " is not one number");
        std::memcpy(&v, t.data, sizeof v);
        return v;
    }

    void put_tensor(tensor const& t) {
        auto [it, fresh] = record_of_.emplace(&t, records_.size());
        if (fresh) records_.push_back({&t, 0});
        pickle_.tensor(t.type, t.shape, t.element_count(), std::to_string(it->second));
    }
    void put_option(std::string const& group, python_option const& o) {
        using enum python_option::source;
        pickle_.text(o.name);
        switch (o.from) {
        case number: pickle_.real(value<double>(at(group + o.name))); break;
        case boolean: pickle_.boolean(value<double>(at(group + o.name)) != 0); break;
        case pair:
            pickle_.begin_tuple();
            pickle_.real(value<double>(at(group + o.name + ".0")));
            pickle_.real(value<double>(at(group + o.name + ".1")));
            pickle_.end_tuple();
            break;
        case none: pickle_.none(); break;
        case always_false: pickle_.boolean(false); break;
        case always_true: pickle_.boolean(true); break;
        }
    }

    std::string pickled() {
        pickle_.begin_dictionary();
        pickle_.text("model");
        pickle_.begin_dictionary();
        for (auto const& [name, stored] : layout_.model) {
            pickle_.text(name);
            put_tensor(at(stored));
        }
        pickle_.end_dictionary();
        pickle_.text("optimizer");
        pickle_.begin_dictionary();
        pickle_.text("state");
        pickle_.begin_dictionary();
        for (std::size_t i = 0; i < layout_.parameters.size(); ++i) put_parameter(i);
        pickle_.end_dictionary();
        pickle_.text("param_groups");
        pickle_.begin_list();
        for (std::size_t g = 0; g < layout_.groups.size(); ++g) {
            pickle_.begin_dictionary();
            for (auto const& o : layout_.groups[g].options) put_option("optimizer.group." + std::to_string(g) + ".", o);
            pickle_.text("params");
            pickle_.begin_list();
            for (auto i : layout_.groups[g].parameters) pickle_.integer(static_cast<std::int64_t>(i));
            pickle_.end_list();
            pickle_.end_dictionary();
        }
        pickle_.end_list();
        pickle_.end_dictionary();
        put_run("rng", "rng.");
        pickle_.text("step");
        pickle_.integer(static_cast<std::int64_t>(values_.step));
        put_run("user", "user.");
        pickle_.end_dictionary();
        return pickle_.finish();
    }

    /// Python's torch.optim has no entry for a parameter without state.
    void put_parameter(std::size_t index) {
        auto const prefix = "optimizer." + layout_.parameters[index] + ".";
        auto const* step = find(prefix + "step");
        auto const* set = find(prefix + "momentum_buffer.set");
        if (set && !value<std::uint8_t>(*set)) {
            zeros_.emplace(find(prefix + "momentum_buffer"));
            return;
        }
        if (!step && !set) return;
        pickle_.integer(static_cast<std::int64_t>(index));
        pickle_.begin_dictionary();
        if (step) {
            pickle_.text("step");
            pickle_.tensor(dtype::F32, {}, 1, std::to_string(records_.size()));
            records_.push_back({nullptr, static_cast<float>(value<std::int64_t>(*step))});
        }
        for (auto const* name : {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
            if (auto const* t = find(prefix + name)) {
                pickle_.text(name);
                put_tensor(*t);
            }
        pickle_.end_dictionary();
    }

    /// A dictionary of the run's tensors with that prefix, scalars as numbers.
    void put_run(std::string_view key, std::string_view prefix) {
        pickle_.text(key);
        pickle_.begin_dictionary();
        for (auto const& t : state_.layers.back().tensors) {
            if (!t.name.starts_with(prefix)) continue;
            pickle_.text(std::string_view(t.name).substr(prefix.size()));
            bool const scalar = t.shape.empty() && t.memory != memory_kind::device;
            if (scalar && t.type == dtype::I64)
                pickle_.integer(value<std::int64_t>(t));
            else if (scalar && t.type == dtype::F64)
                pickle_.real(value<double>(t));
            else
                put_tensor(t);
        }
        pickle_.end_dictionary();
    }

    std::string index_text() const {
        auto list = nlohmann::json::array();
        for (auto const& l : state_.layers)
            for (auto const& t : l.tensors) {
                std::string where;
                if (auto it = record_of_.find(&t); it != record_of_.end())
                    where = record_name(it->second);
                else if (!zeros_.contains(&t) && t.shape.empty())
                    where = "=" + detail::hex_bytes(std::span(static_cast<std::byte const*>(t.data), t.size_bytes()));
                else if (!zeros_.contains(&t))
                    throw error(invalid(), "the torch archive has no place for " + t.name + ": it is not the training state's that it was made for");
                list.push_back({t.name, name(t.type), t.shape, where});
            }
        return list.dump();
    }

    void add(detail::zip_writer& zip, tensor const& t) {
        if (t.memory == memory_kind::device) {
            for (std::uint64_t left = t.size_bytes(); left > 0;) {
                auto const bytes = on_device_->next();
                if (bytes.empty()) throw error(std::make_error_code(std::errc::io_error), "cannot read " + t.name + ": its device has no more bytes");
                zip.add(bytes);
                left -= bytes.size();
            }
            return;
        }
        if (t.strides.empty()) {
            zip.add({static_cast<std::byte const*>(t.data), static_cast<std::size_t>(t.size_bytes())});
            return;
        }
        constexpr std::size_t piece_bytes = 1u << 20;
        std::vector<std::byte> piece(piece_bytes);
        for (std::uint64_t at = 0; at < t.size_bytes(); at += piece_bytes) {
            auto const n = static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, t.size_bytes() - at));
            varve::detail::gather(t, at, n, piece.data());
            zip.add(std::span(piece).first(n));
        }
    }

    state const& state_;
    detail::python_layout const& layout_;
    commit_values const& values_;
    device_memory* device_;
    std::unique_ptr<device_memory::reader> on_device_;  ///< the tensors there, in the records' order
    detail::pickle_writer pickle_;
    std::unordered_map<std::string_view, tensor const*> tensors_;
    std::vector<record> records_;
    std::unordered_map<tensor const*, std::size_t> record_of_;
    std::unordered_set<tensor const*> zeros_;
};

}  // namespace

void write_archive(state const& s, detail::python_layout const& layout, commit_values const& values, byte_stream& out, device_memory* device) {
    writer(s, layout, values, device).write(out);
}

void archive::stream(state const& s, commit_values const& values, byte_stream& out) const {
    write_archive(s, training_->python(), values, out, device_.get());
}

}  // namespace varve::libtorch
