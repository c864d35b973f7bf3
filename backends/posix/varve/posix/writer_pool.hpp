#pragma once

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <stop_token>
#include <system_error>
#include <thread>
#include <vector>

#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/system.hpp"

namespace varve::posix {

/// The threads that carry out the transfers of all targets of a sink, a piece at a time. Thread-safe.
class writer_pool {
public:
    /// Throws std::system_error when a thread cannot be started.
    writer_pool(unsigned threads, std::size_t stripe_bytes, bool direct, system_calls& calls)
        : mode(direct), calls_(calls), stripe_bytes_(stripe_bytes), queue_(expected_requests) {
        for (unsigned i = 0; i < std::max(1u, threads); ++i)
            threads_.emplace_back([this](std::stop_token stop) { work(stop); });
    }

    /// Nothing may be in flight.
    ~writer_pool() = default;
    writer_pool(writer_pool const&) = delete;
    writer_pool& operator=(writer_pool const&) = delete;

    std::size_t threads() const noexcept { return threads_.size(); }

    void submit(detail::file_transfer const& what) noexcept {
        if (what.direct_fd < 0 && what.size_bytes <= small_bytes) return write_here(what);
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

    detail::seen_write_mode mode;

private:
    static constexpr std::size_t expected_requests = 64;
    /// A copy of that size into the page cache costs less than waking a thread for it.
    static constexpr std::size_t small_bytes = 64u << 10;

    /// A share for each thread, and no less than pays.
    std::size_t stripe_of(detail::file_transfer const& what) const noexcept {
        auto share = (what.size_bytes + threads_.size() - 1) / threads_.size();
        share = (share + detail::direct_alignment - 1) / detail::direct_alignment * detail::direct_alignment;
        return std::max(share, stripe_bytes_);
    }

    void write_here(detail::file_transfer const& what) noexcept {
        detail::file_request alone;
        alone.what = what;
        detail::file_piece piece{&alone, 0, what.size_bytes, false};
        int error = carry_out(piece);
        what.done(error == 0 ? std::error_code{} : last_system_error(error));
    }

    int carry_out(detail::file_piece& p) noexcept {
        int error = 0;
        while (error == 0 && !p.over()) {
            auto n = p.request->what.way == detail::transfer::write ? calls_.pwrite(p.fd(), p.data(), p.size(), p.offset())
                                                                    : calls_.pread(p.fd(), p.data(), p.size(), p.offset());
            error = p.take(n < 0 ? -errno : n, mode);
        }
        return error;
    }

    void work(std::stop_token stop) noexcept {
        for (;;) {
            {
                std::unique_lock lock(mutex_);
                if (!work_.wait(lock, stop, [&] { return waiting_ > 0; })) return;
                --waiting_;
            }
            detail::file_piece piece;
            if (queue_.claim(piece)) queue_.finish(piece, carry_out(piece));
        }
    }

    system_calls& calls_;
    std::size_t const stripe_bytes_;
    detail::file_request_queue queue_;
    std::mutex mutex_;
    std::condition_variable_any work_;
    std::size_t waiting_ = 0;  ///< pieces that no thread has taken
    std::vector<std::jthread> threads_;
};

}  // namespace varve::posix
