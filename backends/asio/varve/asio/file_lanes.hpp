#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/basic_random_access_file.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/system/system_error.hpp>

#include "varve/asio/handler_memory.hpp"
#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::asio {

/// Carries out the transfers of all targets of a sink on an io_context, a piece in each lane at a time.
///
/// A lane is one of Asio's files, since Asio carries out the writes of one file one after another. It holds a target's
/// descriptor only while a piece of that target is on its way, so opening and closing targets costs Asio nothing.
/// Pieces are started on the context's threads alone: the kernel cancels what a thread has submitted when it exits.
/// Thread-safe, whatever number of threads run the context.
class file_lanes : public std::enable_shared_from_this<file_lanes> {
public:
    /// The context outlives it. Throws error: errc::unsupported where the kernel refuses io_uring, else the system's code.
    file_lanes(boost::asio::io_context& context, unsigned count, std::size_t piece_bytes, bool direct, system_calls& calls)
        : mode(direct), context_(context), calls_(calls), piece_bytes_(piece_bytes), queue_(std::max(1u, count)) {
        int refused = with_files([&] {
            for (unsigned i = 0; i < std::max(1u, count); ++i) lanes_.push_back(std::make_unique<lane>(context_));
        });
        throw_if_refused(refused);
        for (auto& l : lanes_) free_.push_back(l.get());
    }
    file_lanes(file_lanes const&) = delete;
    file_lanes& operator=(file_lanes const&) = delete;
    ~file_lanes() = default;  ///< nothing may be in flight

    /// Whether Asio can have files here: nothing, or why not.
    static std::error_code available() noexcept {
        int refused = with_files([] {
            boost::asio::io_context context(1);
            lane l(context);
        });
        return refused == 0 ? std::error_code{} : last_system_error(refused);
    }

    std::size_t count() const noexcept { return lanes_.size(); }

    void submit(varve::detail::file_transfer const& what) noexcept {
        if (queue_.push(what, piece_bytes_) == 0) return what.done(std::make_error_code(std::errc::not_enough_memory));
        if (woken_.exchange(true)) return;
        try {
            boost::asio::post(context_, wake_up{shared_from_this()});
        } catch (...) {  // out of memory: then from here
            woken_ = false;
            start_waiting();
        }
    }

    varve::detail::seen_write_mode mode;

private:
    using file_type = boost::asio::basic_random_access_file<boost::asio::io_context::executor_type>;

    struct lane {
        explicit lane(boost::asio::io_context& context) : file(context) {}

        file_type file;
        varve::detail::file_piece piece;
        handler_memory memory;

        /// The descriptor is the target's, and stays open.
        void let_go() noexcept {
            boost::system::error_code ignored;
            if (file.is_open()) file.release(ignored);
        }

        void hold(int fd) {
            if (file.is_open() && file.native_handle() == fd) return;
            let_go();
            file.assign(fd);
        }
    };

    /// Starts what waits. Handlers keep the lanes alive: a completion may be the last that their owner waits for.
    struct wake_up {
        using allocator_type = handler_allocator<void>;
        allocator_type get_allocator() const noexcept { return allocator_type(lanes->wake_memory_); }
        void operator()() const noexcept {
            lanes->woken_ = false;
            lanes->start_waiting();
        }

        std::shared_ptr<file_lanes> lanes;
    };

    struct transferred {
        using allocator_type = handler_allocator<void>;
        allocator_type get_allocator() const noexcept { return allocator_type(here->memory); }
        void operator()(boost::system::error_code const& error, std::size_t n) const noexcept {
            // Asio's own errors are about the end of the file: nothing was transferred.
            auto failed = error.category() == boost::system::system_category() ? -static_cast<std::int64_t>(error.value()) : 0;
            lanes->take(*here, error ? failed : static_cast<std::int64_t>(n));
            lanes->start_waiting();
        }

        std::shared_ptr<file_lanes> lanes;
        lane* here;
    };

    /// Returns 0 or the errno for which Asio cannot have files.
    template <class Body>
    static int with_files(Body body) noexcept {
        try {
            body();
            return 0;
        } catch (boost::system::system_error const& e) {
            return e.code().value() != 0 ? e.code().value() : EIO;
        } catch (...) {
            return ENOMEM;
        }
    }

    static void throw_if_refused(int why) {
        if (why == 0) return;
        auto code = last_system_error(why);
        if (why == EPERM || why == ENOSYS || why == EACCES)
            throw error(errc::unsupported, "the kernel refuses io_uring, which Boost.Asio's files need: " + code.message() +
                                               "; use the posix sink, or see sysctl kernel.io_uring_disabled and the container's seccomp profile");
        throw error(code, "cannot set up Boost.Asio's files: " + code.message() +
                              "; check the limits on open files and locked memory (ulimit -n, ulimit -l)");
    }

    /// Fills the free lanes with pieces that wait.
    void start_waiting() noexcept {
        for (;;) {
            lane* l = nullptr;
            {
                // Both at once: who finds no lane free relies on the one that holds it to look again.
                std::lock_guard lock(mutex_);
                if (free_.empty() || !queue_.claim(free_.back()->piece)) return;
                l = free_.back();
                free_.pop_back();
            }
            go_on(*l);
        }
    }

    void take(lane& l, std::int64_t result) noexcept {
        if (int failed = l.piece.take(result, mode); failed != 0)
            end(l, failed);
        else
            go_on(l);
    }

    /// Starts what is left of the piece, or ends it.
    void go_on(lane& l) noexcept {
        auto& p = l.piece;
        if (p.over()) return end(l, 0);
        int refused = 0;
        auto size = p.ring_bytes(calls_, refused);
        if (refused != 0) return end(l, refused);
        auto offset = static_cast<std::uint64_t>(p.offset());
        try {
            l.hold(p.fd());
            if (p.request->what.way == varve::detail::transfer::write)
                l.file.async_write_some_at(offset, boost::asio::const_buffer(p.data(), size), transferred{shared_from_this(), &l});
            else
                l.file.async_read_some_at(offset, boost::asio::mutable_buffer(p.data(), size), transferred{shared_from_this(), &l});
        } catch (...) {
            end(l, ENOMEM);
        }
    }

    void end(lane& l, int error) noexcept {
        l.let_go();
        auto piece = l.piece;
        {
            std::lock_guard lock(mutex_);
            free_.push_back(&l);
        }
        queue_.finish(piece, error);
    }

    boost::asio::io_context& context_;
    system_calls& calls_;
    std::size_t const piece_bytes_;
    varve::detail::file_request_queue queue_;
    std::atomic<bool> woken_ = false;  ///< a wake_up is posted and has not begun
    handler_memory wake_memory_;
    std::vector<std::unique_ptr<lane>> lanes_;
    std::mutex mutex_;
    std::vector<lane*> free_;  ///< under the mutex
};

}  // namespace varve::asio
