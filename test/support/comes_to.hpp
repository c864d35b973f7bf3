#pragma once

#include <chrono>
#include <thread>

namespace varve_test {

/// Whether the condition comes to hold within that time; it is looked at again and again.
template <class Condition>
bool comes_to(Condition condition, std::chrono::milliseconds within = std::chrono::seconds(30),
              std::chrono::microseconds look_every = std::chrono::milliseconds(5)) {
    for (auto const until = std::chrono::steady_clock::now() + within; !condition(); std::this_thread::sleep_for(look_every))
        if (std::chrono::steady_clock::now() >= until) return false;
    return true;
}

}  // namespace varve_test
