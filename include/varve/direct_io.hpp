#pragma once

namespace varve {

/// Whether a file sink opens files with O_DIRECT.
enum class direct_io {
    automatic,  ///< where the file system gives it
    never       ///< through the page cache; blocks may have any address, offset and length
};

}  // namespace varve
