#pragma once

#include <system_error>

#include "varve/error.hpp"

namespace varve::detail {

/// Whether an error says that the file is broken, and not that it could not be looked at, or brought to a device.
inline bool tells_of_the_file(std::error_code const& code) {
    if (code.category() != make_error_code(errc::malformed).category() && code.category() != std::system_category() &&
        code.category() != std::generic_category())
        return false;
    for (auto other : {std::errc::permission_denied, std::errc::operation_not_permitted, std::errc::too_many_files_open,
                       std::errc::too_many_files_open_in_system, std::errc::not_enough_memory})
        if (code == other) return false;
    return code != errc::mismatch && code != errc::unsupported;
}

}  // namespace varve::detail
