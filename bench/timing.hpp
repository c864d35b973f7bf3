#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

/// What the benchmarks share.
namespace varve_bench {

using clock_type = std::chrono::steady_clock;

inline double ms_since(clock_type::time_point t) { return std::chrono::duration<double, std::milli>(clock_type::now() - t).count(); }

/// Of what is not empty.
inline double median(std::vector<double> v) {
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2), v.end());
    return v[v.size() / 2];
}

}  // namespace varve_bench
