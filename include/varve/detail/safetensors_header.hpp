#pragma once

#include <sys/stat.h>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/detail/header_source.hpp"
#include "varve/detail/safetensors_rules.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"
#include "varve/state.hpp"

namespace varve::detail {

/// Where header and data of a file are.
struct safetensors_extent {
    std::uint64_t file_bytes = 0;
    std::uint64_t data_offset = 0;  ///< 8 + header length

    std::uint64_t data_bytes() const noexcept { return file_bytes - data_offset; }
};

/// One tensor as a header tells it; valid during the visit only. Offsets count from the start of the data.
struct header_entry {
    std::string_view name;
    dtype type = dtype::F32;
    std::span<std::int64_t const> shape;
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
};

/// Length of the header and size of the file, checked against each other.
inline safetensors_extent read_extent(int fd) {
    struct stat info{};
    if (::fstat(fd, &info) != 0) throw_if(last_system_error(errno), "cannot look at the file");
    if (!S_ISREG(info.st_mode)) refuse_file("it is not a regular file");
    safetensors_extent out;
    out.file_bytes = static_cast<std::uint64_t>(info.st_size);
    if (out.file_bytes < header_prefix_bytes) refuse_file("it is shorter than the 8 bytes of the header's length");
    unsigned char prefix[header_prefix_bytes];
    read_exactly(fd, prefix, sizeof prefix, 0);
    std::uint64_t length = 0;
    for (unsigned i = 0; i < header_prefix_bytes; ++i) length |= std::uint64_t{prefix[i]} << 8 * i;
    if (length > max_header_length) refuse_file("its header claims " + std::to_string(length) + " bytes; 100,000,000 are allowed");
    if (length > out.file_bytes - header_prefix_bytes)
        refuse_file("its header claims " + std::to_string(length) + " bytes and the file has " + std::to_string(out.file_bytes));
    out.data_offset = header_prefix_bytes + length;
    char first = 0;
    if (length > 0) read_exactly(fd, &first, 1, header_prefix_bytes);
    if (first != '{') refuse_file("its header does not begin with {");
    return out;
}

/// What nlohmann's SAX parser calls: checks the form of a safetensors header and hands each tensor and each pair of
/// metadata to a visitor with `tensor(header_entry const&)` and `metadata(key, value, offset_of_end_of_value)`.
/// Keeps one entry at a time.
template <class Visitor>
class header_events {
public:
    header_events(Visitor& visitor, header_source const& source) : visitor_(visitor), source_(source) {}

    bool null() { return unexpected("null"); }
    bool boolean(bool) { return unexpected("a truth value"); }
    bool number_integer(std::int64_t) { return unexpected("a negative number"); }
    bool number_float(double, std::string const&) { return unexpected("a number that is no integer"); }
    bool binary(nlohmann::json::binary_t&) { return unexpected("binary data"); }

    bool number_unsigned(std::uint64_t value) {
        if (in_ == place::shape) {
            if (shape_.size() == max_dimensions) refuse_file("the tensor " + printable(name_) + " has more than 1,024 dimensions");
            if (value > INT64_MAX) return bad_shape();
            shape_.push_back(static_cast<std::int64_t>(value));
        } else if (in_ == place::offsets && offset_count_ < 2) {
            offsets_[offset_count_++] = value;
        } else {
            return unexpected("a number");
        }
        return true;
    }

    bool string(std::string& value) {
        if (in_ == place::metadata) {
            visitor_.metadata(name_, value, source_.offset());
        } else if (in_ == place::entry && field_ == has_dtype) {
            auto type = dtype_from_name(value);
            if (!type) refuse_file("the tensor " + printable(name_) + " has the unknown dtype " + printable(std::string_view(value).substr(0, 32)));
            type_ = *type;
            field_ = 0;
        } else {
            return unexpected("a string");
        }
        return true;
    }

    bool key(std::string& value) {
        if (in_ == place::top || in_ == place::metadata) {
            name_ = value;
            return true;
        }
        field_ = value == "dtype" ? has_dtype : value == "shape" ? has_shape : value == "data_offsets" ? has_offsets : 0;
        if (field_ == 0) refuse_file("the tensor " + printable(name_) + " has an unknown key " + printable(std::string_view(value).substr(0, 32)));
        if (seen_ & field_) refuse_file("the tensor " + printable(name_) + " has the key " + value + " twice");
        seen_ |= field_;
        return true;
    }

    bool start_object(std::size_t) {
        if (in_ == place::outside) {
            in_ = place::top;
        } else if (in_ == place::top && name_ == metadata_section) {
            if (metadata_seen_) refuse_file("__metadata__ stands there twice");
            metadata_seen_ = true;
            in_ = place::metadata;
        } else if (in_ == place::top) {
            in_ = place::entry;
            seen_ = field_ = 0;
            offset_count_ = 0;
            shape_.clear();
        } else {
            return unexpected("an object");
        }
        return true;
    }

    bool end_object() {
        if (in_ == place::entry) finish_entry();
        in_ = in_ == place::top ? place::outside : place::top;
        return true;
    }

    bool start_array(std::size_t) {
        if (in_ == place::entry && field_ == has_shape)
            in_ = place::shape;
        else if (in_ == place::entry && field_ == has_offsets)
            in_ = place::offsets;
        else
            return unexpected("a list");
        return true;
    }

    bool end_array() {
        in_ = place::entry;
        field_ = 0;
        return true;
    }

    template <class Exception>
    bool parse_error(std::size_t, std::string const&, Exception const&) {
        refuse_file("its header is not JSON at byte " + std::to_string(source_.offset()));
    }

private:
    enum class place : std::uint8_t { outside, top, metadata, entry, shape, offsets };
    static constexpr unsigned has_dtype = 1, has_shape = 2, has_offsets = 4;

    bool unexpected(char const* what) const {
        refuse_file("its header has " + std::string(what) + " where none belongs, before byte " + std::to_string(source_.offset()));
    }
    bool bad_shape() const { refuse_file("the shape of the tensor " + printable(name_) + " does not fit its data_offsets"); }

    void finish_entry() {
        if (seen_ != (has_dtype | has_shape | has_offsets) || offset_count_ != 2)
            refuse_file("the tensor " + printable(name_) + " lacks its dtype, its shape or a data offset");
        std::uint64_t bytes = element_bytes(type_);
        for (auto d : shape_)
            if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(d), &bytes)) bad_shape();
        if (offsets_[1] < offsets_[0] || offsets_[1] - offsets_[0] != bytes) bad_shape();
        visitor_.tensor(header_entry{name_, type_, shape_, offsets_[0], offsets_[1]});
    }

    Visitor& visitor_;
    header_source const& source_;
    place in_ = place::outside;
    bool metadata_seen_ = false;
    unsigned seen_ = 0;
    unsigned field_ = 0;
    unsigned offset_count_ = 0;
    std::uint64_t offsets_[2] = {};
    dtype type_ = dtype::F32;
    std::string name_;
    std::vector<std::int64_t> shape_;
};

/// Walks through the header; throws errc::malformed where its form is wrong.
template <class Visitor>
void visit_header(int fd, safetensors_extent const& extent, Visitor& visitor) {
    header_source source(fd, header_prefix_bytes, extent.data_offset);
    header_events<Visitor> events(visitor, source);
    nlohmann::json::sax_parse(header_iterator(source), header_iterator(), &events);
}

}  // namespace varve::detail
