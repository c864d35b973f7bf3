#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "varve/cuda/device.hpp"
#include "varve/cuda/error.hpp"

namespace varve::cuda {

/// How long streams of one device stood in waits: two timed events around each wait, read once both have passed.
///
/// A wait that is satisfied already counts with the two or three microseconds that lie between any two events. To measure one costs
/// the calling thread up to ten microseconds, so after the first `all_of_first` it is one in `one_in`, which counts as so many. At
/// most `most_open` waits are measured at a time; one beyond them, or one for which no event can be had, counts as nothing.
/// Nothing here waits. Thread-safe. Source: CUDA Runtime API, "Event Management".
class wait_meter {
public:
    wait_meter() = default;
    wait_meter(wait_meter const&) = delete;
    wait_meter& operator=(wait_meter const&) = delete;
    ~wait_meter() {
        for (auto const& s : spans_) {
            ::cudaEventDestroy(s.begin);
            ::cudaEventDestroy(s.end);
        }
    }

    /// Calls `wait(stream)`, which puts a wait into the stream and returns its error; the calling thread is on the stream's
    /// device, and the stream is not being captured.
    template <class Wait>
    std::error_code around(cudaStream_t stream, Wait wait) noexcept {
        span s = take();
        if (s.begin && code_of(::cudaEventRecord(s.begin, stream))) give_back(s);
        auto const failed = wait(stream);
        if (!s.begin) return failed;
        if (failed || code_of(::cudaEventRecord(s.end, stream))) {
            give_back(s);
            return failed;
        }
        std::lock_guard lock(mutex_);
        open_.push_back(s);
        return {};
    }

    /// The sum of those that have ended by now, an estimate where not all were measured.
    std::int64_t total_ns() noexcept {
        std::lock_guard lock(mutex_);
        if (!open_.empty()) collect();
        return total_ns_;
    }

private:
    static constexpr std::size_t most_open = 1024;
    static constexpr std::uint64_t all_of_first = 64;
    static constexpr std::uint64_t one_in = 17;  ///< odd, since a save has two waits, or four: not the same one every time

    struct span {
        cudaEvent_t begin = nullptr, end = nullptr;
        std::int64_t stands_for = 1;  ///< as many waits
    };

    /// Adds up the waits that are over. They end in the order in which they were issued, as a rule; one that waits longer only
    /// defers those behind it.
    void collect() noexcept {
        relaxed_capture relaxed;
        std::size_t over = 0;
        for (; over < open_.size(); ++over) {
            auto const& s = open_[over];
            auto const result = ::cudaEventQuery(s.end);
            if (code_of(result) && result == cudaErrorNotReady) break;
            float ms = 0;
            if (result == cudaSuccess && !code_of(::cudaEventElapsedTime(&ms, s.begin, s.end)))
                total_ns_ += s.stands_for * static_cast<std::int64_t>(ms * 1e6F);
            free_.push_back(s);
        }
        open_.erase(open_.begin(), open_.begin() + static_cast<std::ptrdiff_t>(over));
    }

    /// Without events for a wait that is not measured.
    span take() noexcept {
        try {
            std::lock_guard lock(mutex_);
            auto const number = waits_++;
            if (number >= all_of_first && number % one_in != 0) return {};
            std::int64_t const stands_for = number < all_of_first ? 1 : one_in;
            if (free_.empty() && !open_.empty()) collect();
            if (!free_.empty()) {
                auto s = free_.back();
                free_.pop_back();
                s.stands_for = stands_for;
                return s;
            }
            if (spans_.size() == most_open) return {};
            // Whatever becomes of it, nothing has to be allocated for it later.
            spans_.reserve(most_open);
            free_.reserve(most_open);
            open_.reserve(most_open);
            span s;
            if (code_of(::cudaEventCreate(&s.begin))) return {};
            if (code_of(::cudaEventCreate(&s.end))) {
                ::cudaEventDestroy(s.begin);
                return {};
            }
            s.stands_for = stands_for;
            spans_.push_back(s);
            return s;
        } catch (std::bad_alloc const&) {
            return {};
        }
    }

    void give_back(span& s) noexcept {
        std::lock_guard lock(mutex_);
        free_.push_back(s);
        s = {};
    }

    std::mutex mutex_;
    std::vector<span> spans_;  ///< all that were made; there is room for most_open in each of the three
    std::vector<span> free_;
    std::vector<span> open_;  ///< whose end may not have passed yet, oldest first
    std::uint64_t waits_ = 0;
    std::int64_t total_ns_ = 0;
};

}  // namespace varve::cuda
