#pragma once

#include <cerrno>
#include <cstddef>
#include <system_error>

#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/detail/piece_threads.hpp"
#include "varve/system.hpp"

namespace varve::posix {

/// The threads that carry out the transfers of all targets of a sink, by pwrite and pread. Thread-safe.
class writer_pool {
public:
    /// Throws std::system_error when a thread cannot be started.
    writer_pool(unsigned threads, std::size_t stripe_bytes, bool direct, system_calls& calls)
        : mode(direct), calls_(calls),
          threads_(threads, stripe_bytes, [this] { return [this](detail::file_piece& p) noexcept { return carry_out(p); }; }) {}

    /// Nothing may be in flight.
    ~writer_pool() = default;
    writer_pool(writer_pool const&) = delete;
    writer_pool& operator=(writer_pool const&) = delete;

    std::size_t threads() const noexcept { return threads_.size(); }

    void submit(detail::file_transfer const& what) noexcept {
        if (what.direct_fd < 0 && what.size_bytes <= small_bytes) return write_here(what);
        threads_.submit(what);
    }

    detail::seen_write_mode mode;

private:
    /// A copy of that size into the page cache costs less than waking a thread for it.
    static constexpr std::size_t small_bytes = 64u << 10;

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

    system_calls& calls_;
    detail::piece_threads threads_;  ///< the last: they use what stands above
};

}  // namespace varve::posix
