#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "varve/state.hpp"

namespace varve::tool {

/// How two tensors of one dtype and shape differ.
struct element_difference {
    std::uint64_t elements = 0;     ///< whose bits differ
    long double largest = 0;        ///< of the values, where both are numbers
    std::uint64_t not_numbers = 0;  ///< elements that differ and are NaN or infinite on a side

    /// Adds what two ranges of whole elements differ in.
    void add(dtype type, std::span<std::byte const> a, std::span<std::byte const> b);
};

}  // namespace varve::tool
