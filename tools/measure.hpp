#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>

#include "varve/observer.hpp"

namespace varve::tool {

using clock = std::chrono::steady_clock;

inline double seconds(clock::duration d) { return std::chrono::duration<double>(d).count(); }

/// Mean, standard deviation of the sample (0 for one), and so on; nothing is defined for no values.
double mean(std::vector<double> const& values);
double sample_std(std::vector<double> const& values);
/// The value that a share of `q` (0 to 1) of the values do not exceed, nearest rank.
double percentile(std::vector<double> values, double q);
double median(std::vector<double> values);

/// An observer that remembers, on the steady clock, when each save began and when it was done. Thread-safe.
class save_recorder {
public:
    void on(event const& e) noexcept;

    struct save {
        std::optional<clock::time_point> begin, written, durable;
        /// Durable, or written where the method promises no more.
        std::optional<clock::time_point> done() const { return durable ? durable : written; }
    };
    std::map<std::uint64_t, save> saves() const;
    std::uint64_t count(milestone m) const noexcept { return counters_.count(m); }
    /// Why saves failed, one line each, since the last call.
    std::vector<std::string> take_failures();

private:
    counters counters_;
    mutable std::mutex mutex_;
    std::map<std::uint64_t, save> saves_;
    std::vector<std::string> failures_;
};

static_assert(observer<save_recorder>);

/// Samples the memory of this process and its children every 20 ms, on a thread of its own.
class memory_sampler {
public:
    memory_sampler();
    ~memory_sampler() { stop(); }
    void stop();

    double peak_gb() const { return peak_; }  ///< after stop()
    double mean_gb() const { return count_ ? sum_ / static_cast<double>(count_) : 0; }
    double now_gb() const { return now_.load(std::memory_order_relaxed); }

private:
    void sample(std::vector<int> const& children);

    double peak_ = 0, sum_ = 0;
    std::uint64_t count_ = 0;
    std::atomic<double> now_{0};
    std::jthread thread_;
};

}  // namespace varve::tool
