#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "varve/state.hpp"

namespace varve::libtorch::detail {

/// Writes what torch.load(weights_only=True) reads: dictionaries, lists, tuples, numbers, strings, and tensors whose bytes
/// are records of the archive. Source: Python's pickletools, protocol 2; torch/serialization.py, `_save`.
class pickle_writer {
public:
    pickle_writer() { out_ += "\x80\x02"; }

    /// A dictionary: then keys and values in turn, then end_dictionary. The same for the others.
    void begin_dictionary() { out_ += "}("; }
    void end_dictionary() { out_ += 'u'; }
    void begin_list() { out_ += "]("; }
    void end_list() { out_ += 'e'; }
    void begin_tuple() { out_ += '('; }
    void end_tuple() { out_ += 't'; }

    void none() { out_ += 'N'; }
    void boolean(bool v) { out_ += v ? '\x88' : '\x89'; }
    void text(std::string_view s) {
        out_ += 'X';
        number(s.size(), 4);
        out_ += s;
    }
    void integer(std::int64_t v) {
        if (v >= std::numeric_limits<std::int32_t>::min() && v <= std::numeric_limits<std::int32_t>::max()) {
            out_ += 'J';
            number(static_cast<std::uint64_t>(v), 4);
        } else {
            out_ += "\x8a\x08";
            number(static_cast<std::uint64_t>(v), 8);
        }
    }
    void real(double v) {
        out_ += 'G';
        auto const bits = std::bit_cast<std::uint64_t>(v);
        for (int shift = 56; shift >= 0; shift -= 8) out_ += static_cast<char>(bits >> shift);
    }

    /// A contiguous tensor whose bytes are the record `data/<key>`.
    void tensor(dtype type, std::span<std::int64_t const> shape, std::uint64_t elements, std::string_view key) {
        auto const [storage, typed, python_dtype] = python_type(type);
        out_ += typed ? "ctorch._utils\n_rebuild_tensor_v2\n" : "ctorch._utils\n_rebuild_tensor_v3\n";
        begin_tuple();
        begin_tuple();
        text("storage");
        out_ += storage;
        text(key);
        text("cpu");
        integer(static_cast<std::int64_t>(typed ? elements : elements * element_bytes(type)));
        end_tuple();
        out_ += 'Q';
        integer(0);
        begin_tuple();
        for (auto d : shape) integer(d);
        end_tuple();
        begin_tuple();
        for (std::size_t i = 0; i < shape.size(); ++i) {
            std::uint64_t stride = 1;  // of a tensor without an element it may overflow, and means nothing
            for (auto d : shape.subspan(i + 1)) stride *= d == 0 ? 1 : static_cast<std::uint64_t>(d);
            integer(static_cast<std::int64_t>(stride));
        }
        end_tuple();
        boolean(false);
        out_ += "ccollections\nOrderedDict\n)R";
        out_ += python_dtype;
        end_tuple();
        out_ += 'R';
    }

    std::string finish() {
        out_ += '.';
        return std::move(out_);
    }

private:
    struct python_names {
        std::string_view storage;
        bool typed;  ///< whether the storage knows the dtype; newer dtypes are named beside an untyped one
        std::string_view dtype;
    };
    static python_names python_type(dtype type) noexcept {
        constexpr std::string_view untyped = "ctorch.storage\nUntypedStorage\n";
        switch (type) {
        case dtype::BOOL: return {"ctorch\nBoolStorage\n", true, ""};
        case dtype::U8: return {"ctorch\nByteStorage\n", true, ""};
        case dtype::I8: return {"ctorch\nCharStorage\n", true, ""};
        case dtype::I16: return {"ctorch\nShortStorage\n", true, ""};
        case dtype::F16: return {"ctorch\nHalfStorage\n", true, ""};
        case dtype::BF16: return {"ctorch\nBFloat16Storage\n", true, ""};
        case dtype::I32: return {"ctorch\nIntStorage\n", true, ""};
        case dtype::F32: return {"ctorch\nFloatStorage\n", true, ""};
        case dtype::C64: return {"ctorch\nComplexFloatStorage\n", true, ""};
        case dtype::F64: return {"ctorch\nDoubleStorage\n", true, ""};
        case dtype::I64: return {"ctorch\nLongStorage\n", true, ""};
        case dtype::F8_E5M2: return {untyped, false, "ctorch\nfloat8_e5m2\n"};
        case dtype::F8_E4M3: return {untyped, false, "ctorch\nfloat8_e4m3fn\n"};
        case dtype::U16: return {untyped, false, "ctorch\nuint16\n"};
        case dtype::U32: return {untyped, false, "ctorch\nuint32\n"};
        case dtype::U64: return {untyped, false, "ctorch\nuint64\n"};
        }
        return {};
    }

    void number(std::uint64_t v, int bytes) {
        for (int i = 0; i < bytes; ++i) out_ += static_cast<char>(v >> (8 * i));
    }

    std::string out_;
};

}  // namespace varve::libtorch::detail
