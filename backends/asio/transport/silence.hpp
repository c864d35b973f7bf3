#pragma once

#include <algorithm>
#include <chrono>

namespace varve::asio {

/// How long nothing has come from a peer, as far as this process could have heard it: after a stop of its own, in a debugger say or
/// with its machine, it finds the clock ahead before it finds what came meanwhile. Not thread-safe.
class silence {
public:
    using clock = std::chrono::steady_clock;

    explicit silence(clock::time_point now) noexcept : looked_(now) {}

    /// Something came.
    void broken(clock::time_point now) noexcept {
        lasted_ = {};
        looked_ = now;
    }

    /// To be asked about every `period`: of more than two of them since the last time, two count.
    clock::duration lasted(clock::time_point now, clock::duration period) noexcept {
        lasted_ += std::min(now - looked_, 2 * period);
        looked_ = now;
        return lasted_;
    }

private:
    clock::time_point looked_;
    clock::duration lasted_{};
};

}  // namespace varve::asio
