#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/error.hpp"
#include "varve/state.hpp"

namespace varve::asio::detail {

[[noreturn]] inline void refuse_message(std::string const& line) { throw error(errc::malformed, "malformed message: " + line); }

/// The most that one message may list, whatever its bytes say: what is small on the wire may be large in memory.
inline constexpr std::size_t most_layers = 1u << 20;
inline constexpr std::size_t most_tensors = 1u << 20;
inline constexpr std::size_t most_dimensions = 64;
inline constexpr std::size_t most_pairs = 1u << 20;

/// Appends fields as they stand on the wire: integers little-endian, strings and arrays as u32 count and content.
/// A field_reader has the same members, so that a message says its fields once for both ways.
class field_writer {
public:
    explicit field_writer(std::vector<std::byte>& out) noexcept : out_(out) {}

    template <class... Fields>
    void operator()(Fields const&... fields) {
        (put(fields), ...);
    }
    template <class E>
    void choice(E value, std::uint8_t) {
        put(static_cast<std::uint8_t>(value));
    }
    /// There is nothing more that the other side could read.
    void skip_rest() noexcept {}
    /// The bytes that end the message, without a count.
    void rest(std::span<std::byte const> bytes) { out_.insert(out_.end(), bytes.begin(), bytes.end()); }

private:
    template <std::unsigned_integral T>
    void put(T value) {
        if constexpr (std::same_as<T, bool>)
            out_.push_back(static_cast<std::byte>(value));
        else
            for (std::size_t i = 0; i < sizeof(T); ++i) out_.push_back(static_cast<std::byte>(value >> 8 * i));
    }
    void put(std::string_view text) {
        count(text.size());
        rest(std::as_bytes(std::span(text)));
    }
    void put(std::vector<std::uint64_t> const& list) {
        count(list.size());
        for (auto v : list) put(v);
    }
    void put(std::map<std::string, std::string> const& pairs) {
        count(pairs.size());
        for (auto const& [key, value] : pairs) (*this)(key, value);
    }
    void put(std::vector<layer> const& layers) {
        count(layers.size());
        for (auto const& l : layers) {
            put(std::string_view(l.name));
            count(l.tensors.size());
            for (auto const& t : l.tensors) {
                put(std::string_view(t.name));
                put(static_cast<std::uint8_t>(t.type));
                count(t.shape.size());
                for (auto d : t.shape) put(static_cast<std::uint64_t>(d));
            }
        }
    }
    /// 0 and varve's value, or 1 and the system's.
    void put(std::error_code code) {
        bool const ours = code.category() == varve::category();
        bool const systems = code.category() == std::system_category() || code.category() == std::generic_category();
        put(static_cast<std::uint8_t>(ours ? 0 : 1));
        put(static_cast<std::uint32_t>(ours || systems ? code.value() : static_cast<int>(std::errc::io_error)));
    }
    void count(std::size_t n) { put(static_cast<std::uint32_t>(n)); }

    std::vector<std::byte>& out_;
};

/// Takes fields off the front of a payload. Throws errc::malformed for what does not fit into it.
class field_reader {
public:
    explicit field_reader(std::span<std::byte const> payload) noexcept : left_(payload) {}

    template <class... Fields>
    void operator()(Fields&... fields) {
        (take(fields), ...);
    }
    /// One of the values 0 to largest.
    template <class E>
    void choice(E& value, std::uint8_t largest) {
        auto const v = integer<std::uint8_t>();
        if (v > largest) refuse_message("the choice " + std::to_string(v) + ", where " + std::to_string(largest) + " is the last");
        value = static_cast<E>(v);
    }
    void skip_rest() noexcept { left_ = {}; }
    void rest(std::span<std::byte const>& bytes) noexcept { bytes = std::exchange(left_, {}); }

    void expect_end() const {
        if (!left_.empty()) refuse_message(std::to_string(left_.size()) + " bytes too many");
    }

private:
    template <std::unsigned_integral T>
    T integer() {
        T value = 0;
        for (std::size_t i = 0; auto b : bytes(sizeof(T))) value = static_cast<T>(value | static_cast<T>(static_cast<T>(b) << 8 * i++));
        return value;
    }
    template <std::unsigned_integral T>
    void take(T& value) {
        if constexpr (std::same_as<T, bool>)
            choice(value, 1);
        else
            value = integer<T>();
    }
    void take(std::string& text) {
        auto const content = bytes(count(1));
        text.assign(reinterpret_cast<char const*>(content.data()), content.size());
    }
    void take(std::vector<std::uint64_t>& list) {
        list.resize(count(sizeof(std::uint64_t)));
        for (auto& v : list) v = integer<std::uint64_t>();
    }
    void take(std::map<std::string, std::string>& pairs) {
        auto n = count(8);
        if (n > most_pairs) refuse_message(std::to_string(n) + " keys");
        for (; n > 0; --n) {
            std::string key, value;
            (*this)(key, value);
            if (!pairs.try_emplace(std::move(key), std::move(value)).second) refuse_message("a key twice");
        }
    }
    void take(std::vector<layer>& layers) {
        auto const n = count(8);
        if (n > most_layers) refuse_message(std::to_string(n) + " layers");
        std::size_t tensors = 0;
        layers.resize(n);
        for (auto& l : layers) {
            take(l.name);
            auto const m = count(9);
            if ((tensors += m) > most_tensors) refuse_message("more than " + std::to_string(most_tensors) + " tensors");
            l.tensors.resize(m);
            for (auto& t : l.tensors) take(t);
        }
    }
    void take(tensor& t) {
        take(t.name);
        choice(t.type, static_cast<std::uint8_t>(dtype_count - 1));
        auto const n = count(sizeof(std::uint64_t));
        if (n > most_dimensions) refuse_message("a tensor of " + std::to_string(n) + " dimensions");
        t.shape.resize(n);
        for (auto& d : t.shape) d = static_cast<std::int64_t>(integer<std::uint64_t>());
    }
    void take(std::error_code& code) {
        std::uint8_t category = 0;
        choice(category, 1);
        auto const value = static_cast<int>(integer<std::uint32_t>());
        code = category == 0 ? std::error_code(value, varve::category()) : std::error_code(value, std::system_category());
    }

    /// How many elements follow; each takes at least so many bytes, which must be there.
    std::size_t count(std::size_t element_bytes) {
        auto const n = integer<std::uint32_t>();
        if (n > left_.size() / element_bytes) refuse_message("it promises " + std::to_string(n) + " elements and ends before them");
        return n;
    }
    std::span<std::byte const> bytes(std::size_t n) {
        if (n > left_.size()) refuse_message("it ends within a field");
        auto const front = left_.first(n);
        left_ = left_.subspan(n);
        return front;
    }

    std::span<std::byte const> left_;
};

}  // namespace varve::asio::detail
