#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <stop_token>
#include <system_error>
#include <thread>
#include <vector>

#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/detail/thread_name.hpp"
#include "varve/system.hpp"

namespace varve::detail {

/// Threads that carry out transfers, a piece at a time; how is their owner's part. Thread-safe.
class piece_threads {
public:
    /// Each thread calls `make()` once, and what that yields with every piece: `int(file_piece&)`, noexcept, which carries out
    /// the whole piece and returns 0 or its failure. `code_of` makes the code of that. What they refer to outlives this.
    /// Throws std::system_error when a thread cannot be started.
    template <class Make>
    piece_threads(unsigned threads, std::size_t stripe_bytes, Make make, std::error_code (*code_of)(int) noexcept = last_system_error)
        : stripe_bytes_(stripe_bytes), queue_(expected_requests, code_of) {
        for (unsigned i = 0; i < std::max(1u, threads); ++i) threads_.emplace_back([this, make](std::stop_token stop) { work(stop, make()); });
    }

    /// Nothing may be in flight.
    ~piece_threads() = default;
    piece_threads(piece_threads const&) = delete;
    piece_threads& operator=(piece_threads const&) = delete;

    std::size_t size() const noexcept { return threads_.size(); }

    void submit(file_transfer const& what) noexcept {
        auto pieces = queue_.push(what, stripe_of(what));
        if (pieces == 0) return what.done(std::make_error_code(std::errc::not_enough_memory));
        {
            std::lock_guard lock(mutex_);
            waiting_ += pieces;
        }
        if (pieces == 1)
            work_.notify_one();
        else
            work_.notify_all();
    }

private:
    static constexpr std::size_t expected_requests = 64;

    /// A share for each thread, and no less than pays.
    std::size_t stripe_of(file_transfer const& what) const noexcept {
        auto share = (what.size_bytes + threads_.size() - 1) / threads_.size();
        share = (share + direct_alignment - 1) / direct_alignment * direct_alignment;
        return std::max(share, stripe_bytes_);
    }

    template <class CarryOut>
    void work(std::stop_token stop, CarryOut carry_out) noexcept {
        name_this_thread("varve-pieces");
        for (;;) {
            {
                std::unique_lock lock(mutex_);
                if (!work_.wait(lock, stop, [&] { return waiting_ > 0; })) return;
                --waiting_;
            }
            file_piece piece;
            if (queue_.claim(piece)) queue_.finish(piece, carry_out(piece));
        }
    }

    std::size_t const stripe_bytes_;
    file_request_queue queue_;
    std::mutex mutex_;
    std::condition_variable_any work_;
    std::size_t waiting_ = 0;  ///< pieces that no thread has taken
    std::vector<std::jthread> threads_;
};

}  // namespace varve::detail
