#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace varve::detail {

/// Calls make_worker() once on each of `workers` threads (this one is one of them), and what it returns for each index
/// below `count`, each once. When calls throw, no index above the lowest that threw is begun, and what that one threw
/// is thrown here: the outcome doesn't depend on the threads.
template <class MakeWorker>
void for_each_index(std::uint64_t count, unsigned workers, MakeWorker make_worker) {
    std::atomic<std::uint64_t> next{0};
    std::mutex mutex;
    std::uint64_t failed_at = std::numeric_limits<std::uint64_t>::max();
    std::exception_ptr failure;
    auto run = [&] {
        std::uint64_t index = 0;
        try {
            auto work = make_worker();
            while ((index = next.fetch_add(1, std::memory_order_relaxed)) < count) work(index);
        } catch (...) {
            next.store(count, std::memory_order_relaxed);
            std::lock_guard lock(mutex);
            if (!failure || index < failed_at) {
                failed_at = index;
                failure = std::current_exception();
            }
        }
    };
    {
        std::vector<std::jthread> threads;
        auto others = std::min<std::uint64_t>(std::max(1u, workers), std::max<std::uint64_t>(1, count)) - 1;
        for (std::uint64_t i = 0; i < others; ++i) {
            try {
                threads.emplace_back(run);
            } catch (std::system_error const&) {
                break;  // fewer threads do the same work
            }
        }
        run();
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace varve::detail
