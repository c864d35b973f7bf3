#include "element_difference.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace varve::tool {

namespace {

template <class T>
T load(std::byte const* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

/// A small float with one sign bit. With `only_nan` the largest exponent is of ordinary numbers, but for all ones, and there
/// are no infinities (float8_e4m3fn).
long double small_float(unsigned bits, int exponent_bits, int mantissa_bits, bool only_nan = false) {
    unsigned const mantissa = bits & ((1u << mantissa_bits) - 1);
    unsigned const largest_exponent = (1u << exponent_bits) - 1;
    unsigned const exponent = bits >> mantissa_bits & largest_exponent;
    int const bias = (1 << (exponent_bits - 1)) - 1;
    long double const sign = bits >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
    if (only_nan ? exponent == largest_exponent && mantissa == (1u << mantissa_bits) - 1 : exponent == largest_exponent) return NAN;
    if (exponent == 0) return sign * std::ldexp(static_cast<long double>(mantissa), 1 - bias - mantissa_bits);
    return sign * std::ldexp(static_cast<long double>(mantissa | 1u << mantissa_bits), static_cast<int>(exponent) - bias - mantissa_bits);
}

long double value_of(dtype type, std::byte const* at) {
    switch (type) {
    case dtype::BOOL:
    case dtype::U8: return load<std::uint8_t>(at);
    case dtype::I8: return load<std::int8_t>(at);
    case dtype::F8_E5M2: return small_float(load<std::uint8_t>(at), 5, 2);
    case dtype::F8_E4M3: return small_float(load<std::uint8_t>(at), 4, 3, true);
    case dtype::I16: return load<std::int16_t>(at);
    case dtype::U16: return load<std::uint16_t>(at);
    case dtype::F16: return small_float(load<std::uint16_t>(at), 5, 10);
    case dtype::BF16: return small_float(load<std::uint16_t>(at), 8, 7);
    case dtype::I32: return load<std::int32_t>(at);
    case dtype::U32: return load<std::uint32_t>(at);
    case dtype::F32:
    case dtype::C64: return load<float>(at);
    case dtype::F64: return load<double>(at);
    case dtype::I64: return static_cast<long double>(load<std::int64_t>(at));
    case dtype::U64: return static_cast<long double>(load<std::uint64_t>(at));
    }
    return 0;
}

}  // namespace

void element_difference::add(dtype type, std::span<std::byte const> a, std::span<std::byte const> b) {
    if (std::memcmp(a.data(), b.data(), a.size()) == 0) return;
    auto const size = element_bytes(type);
    auto const part = type == dtype::C64 ? size / 2 : size;  // real and imaginary part each count for the largest difference
    for (std::size_t at = 0; at < a.size(); at += size) {
        if (std::memcmp(&a[at], &b[at], size) == 0) continue;
        ++elements;
        bool numbers = true;
        for (std::size_t p = at; p < at + size; p += part) {
            auto const difference = std::abs(value_of(type, &a[p]) - value_of(type, &b[p]));
            if (std::isfinite(difference))
                largest = std::max(largest, difference);
            else
                numbers = false;
        }
        if (!numbers) ++not_numbers;
    }
}

}  // namespace varve::tool
