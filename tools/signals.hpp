#pragma once

namespace varve::tool {

/// While it lives, SIGINT and SIGTERM set a flag instead of ending the process. One at a time.
///
/// `second_ends`: a second signal does what it does by default, for a user who will not wait for the save.
class stop_signals {
public:
    explicit stop_signals(bool second_ends);
    ~stop_signals();
    stop_signals(stop_signals const&) = delete;
    stop_signals& operator=(stop_signals const&) = delete;

    /// How many signals came.
    static int count() noexcept;
    static bool requested() noexcept { return count() > 0; }
};

}  // namespace varve::tool
