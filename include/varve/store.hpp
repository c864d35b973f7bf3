#pragma once

// (the store's own text follows; this part is what others code against)
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace varve {

/// What becomes of a slot when the store opens.
enum class prepare_mode {
    write,     ///< allocated and written once, so that every save overwrites
    allocate,  ///< allocated only
    none       ///< grows when it is written
};

/// A checkpoint that was read back into the state.
struct restored_checkpoint {
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    std::filesystem::path path;
};

}  // namespace varve
