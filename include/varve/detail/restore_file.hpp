#pragma once

#include <string>
#include <utility>

#include "varve/concepts/format.hpp"
#include "varve/error.hpp"
#include "varve/state.hpp"

namespace varve::detail {

/// Whether a restore of the file has no reason to fail before it comes to the tensors' bytes.
inline bool fits(file_format const& format, int fd, state const& s) {
    try {
        format.identify(fd);
        format.expect_same_layout(fd, s);
        return true;
    } catch (error const&) {
        return false;
    }
}

/// Reads a checkpoint of varve's into the state, and its header once where the digests are checked: of a large model that takes
/// a tenth of the time that its bytes take from memory. Throws what the format throws; `touched` is true afterwards if tensors
/// may have changed.
inline checkpoint_identity restore_file(file_format const& format, int fd, state& s, restore_options const& options, bool& touched) {
    checkpoint_identity identity;
    if (!options.check_digests) identity = format.identify(fd);
    try {
        auto said = format.restore(fd, s, options);
        return options.check_digests ? std::move(said) : std::move(identity);
    } catch (...) {
        touched = touched || fits(format, fd, s);
        throw;
    }
}

/// The end of a message on what a restore came to.
inline std::string undefined_if(bool touched) { return touched ? "; the tensors are undefined" : ""; }

}  // namespace varve::detail
