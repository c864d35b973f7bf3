#pragma once

#include <stdexcept>

namespace varve::tool {

/// The command was used wrongly: one line of what, where and what to do; it ends with exit code 2.
struct usage_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The user asked it to stop (SIGINT, SIGTERM) and everything in flight was drained; it ends with exit code 130.
struct interrupted : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace varve::tool
