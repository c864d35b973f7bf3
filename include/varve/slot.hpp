#pragma once

#include <string>

namespace varve {

/// What becomes of a slot when the store opens.
enum class prepare_mode {
    write,     ///< allocated and written once, so that every save overwrites: a quarter to a third faster than extending
    allocate,  ///< allocated only
    none       ///< grows when it is written
};

/// A file that a save may write: `.partial-<n>` in the store's folder.
struct slot {
    std::string name;
    bool written = false;  ///< every block of it was written once
};

}  // namespace varve
