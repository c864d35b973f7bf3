#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/error.hpp"

namespace varve {

/// The element types of safetensors.
/// Source: https://github.com/huggingface/safetensors, safetensors/src/tensor.rs, `Dtype`.
enum class dtype : std::uint8_t { BOOL, U8, I8, F8_E5M2, F8_E4M3, I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64 };

inline constexpr std::size_t dtype_count = 16;

/// The name that a safetensors header gives the dtype.
constexpr std::string_view name(dtype type) noexcept {
    constexpr std::array<std::string_view, dtype_count> names{"BOOL", "U8",  "I8",  "F8_E5M2", "F8_E4M3", "I16", "U16", "F16",
                                                              "BF16", "I32", "U32", "F32",     "C64",     "F64", "I64", "U64"};
    return names[static_cast<std::size_t>(type)];
}

/// Bytes of one element: 1, 2, 4 or 8.
constexpr std::size_t element_bytes(dtype type) noexcept {
    constexpr std::array<std::uint8_t, dtype_count> sizes{1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8};
    return sizes[static_cast<std::size_t>(type)];
}

/// The dtype of that name, or nothing.
constexpr std::optional<dtype> dtype_from_name(std::string_view text) noexcept {
    for (std::size_t i = 0; i < dtype_count; ++i)
        if (name(static_cast<dtype>(i)) == text) return static_cast<dtype>(i);
    return std::nullopt;
}

/// Where bytes are: ordinary host memory, page-locked host memory, or a GPU's memory.
enum class memory_kind : std::uint8_t { host, pinned, device };

/// A named tensor of the training run; non-owning.
/// `strides` counts elements and is empty for a contiguous (row-major) tensor.
struct tensor {
    std::string name;
    varve::dtype type = dtype::F32;
    std::vector<std::int64_t> shape;
    void* data = nullptr;
    std::vector<std::int64_t> strides;
    memory_kind memory = memory_kind::host;

    std::uint64_t element_count() const noexcept {
        std::uint64_t n = 1;
        for (auto d : shape) n *= static_cast<std::uint64_t>(d);
        return n;
    }
    std::uint64_t size_bytes() const noexcept { return element_count() * element_bytes(type); }
};

/// What one update makes ready together.
struct layer {
    std::string name;
    std::vector<tensor> tensors;
};

using metadata_map = std::map<std::string, std::string>;

/// The named tensors of a run, in layers, in the order in which they are updated; non-owning.
///
/// Addresses, shapes, dtypes and strides stay put from step to step. The hooks let whoever built the state keep it
/// so: a backend whose optimizer keeps scalars outside of tensors copies them into tensors of its own and back.
/// Every hook is called on the training thread and may be empty.
class state {
public:
    std::vector<layer> layers;
    /// Other names of a stored tensor: alias -> name.
    std::map<std::string, std::string> aliases;

    /// Says whether the tensors of a layer are still where `layers` says; called with its index when that layer is announced, after
    /// its update, before refresh. An error ends the save with it.
    std::function<std::error_code(std::size_t)> recheck;
    /// The same before a restore writes to them, which may put back what a save would miss. Where it is empty, recheck is asked.
    std::function<std::error_code(std::size_t)> recheck_to_restore;
    /// Brings tensors that mirror other values up to date; called with a layer's index when that layer is announced.
    std::function<void(std::size_t)> refresh;
    /// Hands restored values on to where they belong; called once after a restore that succeeded.
    std::function<void()> restored;

    /// Index of the layer of that name; throws error(std::errc::invalid_argument) if there is none.
    std::size_t index_of(std::string_view layer_name) const {
        for (std::size_t i = 0; i < layers.size(); ++i)
            if (layers[i].name == layer_name) return i;
        throw error(std::make_error_code(std::errc::invalid_argument), "no layer named " + std::string(layer_name));
    }

    /// Whether any tensor lies in GPU memory.
    bool in_device_memory() const noexcept {
        for (auto const& l : layers)
            for (auto const& t : l.tensors)
                if (t.memory == memory_kind::device) return true;
        return false;
    }

    /// Bytes of all tensors.
    std::uint64_t size_bytes() const noexcept {
        std::uint64_t n = 0;
        for (auto const& l : layers)
            for (auto const& t : l.tensors) n += t.size_bytes();
        return n;
    }
};

}  // namespace varve
