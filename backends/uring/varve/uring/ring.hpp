#pragma once

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/detail/thread_name.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"
#include "varve/uring/registered_memory.hpp"

namespace varve::uring {

/// An io_uring and the one thread that submits to it and reaps it, shared by all targets of a sink.
///
/// Other threads only queue what they want and wake that thread: the kernel cancels what a thread has submitted when it
/// exits, and interrupts it to complete it, and neither may happen to a training thread. Thread-safe but for remember.
class ring {
public:
    /// Throws error: errc::unsupported where the kernel refuses io_uring, else the system's code.
    ring(unsigned queue_depth, std::size_t piece_bytes, bool direct, system_calls& calls)
        : mode(direct), calls_(calls), piece_bytes_(piece_bytes), queue_(queue_depth), flights_(std::max(1u, queue_depth)),
          wake_(::eventfd(0, EFD_CLOEXEC), system_calls::kernel()) {
        if (!wake_) throw_if(last_system_error(errno), "cannot make an event descriptor for io_uring");
        // One entry a flight and one for the wake-up.
        throw_if_refused(handle_.open(static_cast<unsigned>(flights_.size()) + 1));
        for (auto& f : flights_) free_.push_back(&f);
        memory_.prepare(handle_.get());
        thread_ = std::thread([this] {
            detail::name_this_thread("varve-ring");
            run();
        });
    }

    /// Nothing may be in flight.
    ~ring() {
        stop_ = true;
        wake();
        thread_.join();
    }
    ring(ring const&) = delete;
    ring& operator=(ring const&) = delete;

    /// Whether a ring can be had here: nothing, or why not.
    static std::error_code available() noexcept {
        handle h;
        int refused = h.open(2);
        return refused == 0 ? std::error_code{} : last_system_error(refused);
    }

    std::size_t queue_depth() const noexcept { return flights_.size(); }
    registered_memory& memory() noexcept { return memory_; }
    registered_memory const& memory() const noexcept { return memory_; }

    void submit(detail::file_transfer const& what) noexcept {
        if (queue_.push(what, piece_bytes_) == 0) return what.done(std::make_error_code(std::errc::not_enough_memory));
        wake();
    }

    detail::seen_write_mode mode;

private:
    /// A ring that ends itself.
    class handle {
    public:
        handle() noexcept = default;
        handle(handle const&) = delete;
        handle& operator=(handle const&) = delete;
        ~handle() {
            if (open_) ::io_uring_queue_exit(&ring_);
        }
        /// Returns 0 or an errno.
        int open(unsigned entries) noexcept {
            int result = ::io_uring_queue_init(entries, &ring_, 0);
            open_ = result == 0;
            return -result;
        }
        io_uring* get() noexcept { return &ring_; }

    private:
        io_uring ring_{};
        bool open_ = false;
    };

    /// A piece between its submission and its completion.
    struct flight {
        detail::file_piece piece;
    };

    static void throw_if_refused(int why) {
        if (why == 0) return;
        auto code = last_system_error(why);
        if (why == EPERM || why == ENOSYS || why == EACCES)
            throw error(errc::unsupported, "the kernel refuses io_uring: " + code.message() +
                                               "; use the posix sink, or see sysctl kernel.io_uring_disabled and the container's seccomp profile");
        throw error(code, "cannot set up io_uring: " + code.message() + "; check the limits on open files and locked memory (ulimit -n, ulimit -l)");
    }

    /// The thread sleeps in the ring: it is woken by a read of the event descriptor that is submitted like any other.
    void wake() noexcept {
        std::uint64_t one = 1;
        while (::write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
        }
    }

    io_uring_sqe* next_entry() noexcept {
        auto* sqe = ::io_uring_get_sqe(handle_.get());
        while (!sqe) {  // entries that the kernel did not take yet
            submit_entries(0);
            sqe = ::io_uring_get_sqe(handle_.get());
        }
        return sqe;
    }

    void submit_entries(unsigned wait_for) noexcept {
        int result = ::io_uring_submit_and_wait(handle_.get(), wait_for);
        // Out of memory or of room for completions: what was not taken stays queued, and goes with the next call.
        if (result < 0 && result != -EINTR) std::this_thread::sleep_for(std::chrono::microseconds(200));
    }

    void arm_wake() noexcept {
        auto* sqe = next_entry();
        ::io_uring_prep_read(sqe, wake_.get(), &wake_count_, sizeof wake_count_, 0);
        ::io_uring_sqe_set_data(sqe, nullptr);
    }

    void run() noexcept {
        arm_wake();
        for (;;) {
            while (!free_.empty()) {
                detail::file_piece piece;
                if (!queue_.claim(piece)) break;
                auto* f = free_.back();
                free_.pop_back();
                f->piece = piece;
                go_on(*f);
            }
            if (stop_ && free_.size() == flights_.size()) return;
            submit_entries(1);
            io_uring_cqe* cqe = nullptr;
            while (::io_uring_peek_cqe(handle_.get(), &cqe) == 0) {
                auto* f = static_cast<flight*>(::io_uring_cqe_get_data(cqe));
                int result = cqe->res;
                ::io_uring_cqe_seen(handle_.get(), cqe);
                if (!f) {
                    arm_wake();
                } else if (int failed = f->piece.take(result, mode); failed != 0) {
                    end(*f, failed);
                } else {
                    go_on(*f);
                }
            }
        }
    }

    /// Submits what is left of the piece, or ends it.
    void go_on(flight& f) noexcept {
        auto& p = f.piece;
        if (p.over()) return end(f, 0);
        int refused = 0;
        std::size_t size = p.ring_bytes(calls_, refused);
        if (refused != 0) return end(f, refused);
        bool writes = p.request->what.way == detail::transfer::write;
        auto length = static_cast<unsigned>(size);
        auto offset = static_cast<std::uint64_t>(p.offset());
        int entry = memory_.entry_of(p.request->what.slot, p.data(), size);
        auto* sqe = next_entry();
        if (writes && entry >= 0)
            ::io_uring_prep_write_fixed(sqe, p.fd(), p.data(), length, offset, entry);
        else if (writes)
            ::io_uring_prep_write(sqe, p.fd(), p.data(), length, offset);
        else
            ::io_uring_prep_read(sqe, p.fd(), p.data(), length, offset);
        ::io_uring_sqe_set_data(sqe, &f);
    }

    void end(flight& f, int error) noexcept {
        auto piece = f.piece;
        free_.push_back(&f);
        queue_.finish(piece, error);
    }

    system_calls& calls_;
    std::size_t const piece_bytes_;
    detail::file_request_queue queue_;
    std::vector<flight> flights_;
    std::vector<flight*> free_;  ///< the thread's
    file_descriptor wake_;
    std::uint64_t wake_count_ = 0;
    handle handle_;
    registered_memory memory_;
    std::atomic<bool> stop_ = false;
    std::thread thread_;
};

}  // namespace varve::uring
