#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/error.hpp"
#include "varve/state.hpp"
#include "varve/system.hpp"

namespace varve::detail {

enum class transfer : std::uint8_t { write, read };

/// What a target asks for: bytes to or from a file. The descriptors stay open until the completion.
struct file_transfer {
    transfer way = transfer::write;
    int direct_fd = -1;
    int buffered_fd = -1;
    std::byte* data = nullptr;
    std::uint64_t offset_bytes = 0;
    std::size_t size_bytes = 0;
    int slot = unregistered;
    completion done{};
    memory_kind memory = memory_kind::host;
    void* file = nullptr;  ///< what the engine knows the file by, if it has a name of its own for it

    /// How many of the bytes, from the first, may go through the direct descriptor.
    std::size_t direct_bytes() const noexcept {
        bool aligned = offset_bytes % direct_alignment == 0 && reinterpret_cast<std::uintptr_t>(data) % direct_alignment == 0;
        return direct_fd >= 0 && aligned ? size_bytes - size_bytes % direct_alignment : 0;
    }
};

/// A transfer on its way, cut into pieces that are carried out side by side.
struct file_request {
    file_transfer what;
    std::size_t direct_bytes = 0;
    std::size_t piece_bytes = 0;
    std::size_t claimed_bytes = 0;           ///< under the queue's mutex
    file_request* next = nullptr;            ///< under the queue's mutex
    std::atomic<std::size_t> unfinished{0};  ///< pieces
    std::atomic<int> error{0};               ///< errno, or the engine's own number, of the first piece that failed
};

/// A part of a request that one system call at a time carries out; `begin` moves as bytes go.
struct file_piece {
    file_request* request = nullptr;
    std::size_t begin = 0;
    std::size_t end = 0;
    bool direct = false;

    static constexpr std::size_t longest_ring_bytes = 1u << 30;  ///< of one entry of a ring, whose length has 32 bits

    bool over() const noexcept { return begin == end || request->error.load(std::memory_order_relaxed) != 0; }
    int fd() const noexcept { return direct ? request->what.direct_fd : request->what.buffered_fd; }
    std::byte* data() const noexcept { return request->what.data + begin; }
    std::size_t size() const noexcept { return end - begin; }
    off_t offset() const noexcept { return static_cast<off_t>(request->what.offset_bytes + begin); }

    /// How much of what is left a ring may be given now: fewer where the seam tears it, or 0 and the errno that ends the piece.
    std::size_t ring_bytes(system_calls& calls, int& error) noexcept {
        std::size_t bytes = std::min(size(), longest_ring_bytes);
        if (request->what.way == transfer::read) return bytes;
        ssize_t allowed = 0;
        do allowed = calls.ring_write(fd(), data(), bytes, offset());
        while (allowed < 0 && (errno == EINTR || errno == EAGAIN));
        if (allowed <= 0) {
            error = allowed < 0 ? errno : EIO;
            return 0;
        }
        bytes = std::min(bytes, static_cast<std::size_t>(allowed));
        // What is torn inside a block of the disk cannot go direct.
        if (direct && bytes % direct_alignment != 0) {
            if (bytes < direct_alignment)
                direct = false;
            else
                bytes -= bytes % direct_alignment;
        }
        return bytes;
    }

    /// Takes what one call transferred or, below 0, its negative errno. Returns the errno that ends the piece, or 0.
    int take(std::int64_t result, seen_write_mode& mode) noexcept {
        if (result == -EINTR || result == -EAGAIN) return 0;
        if (result == -EINVAL && direct) {
            // O_DIRECT was given, but not for this alignment.
            direct = false;
            mode.saw(write_mode::buffered);
            return 0;
        }
        if (result < 0) return static_cast<int>(-result);
        if (result == 0) return EIO;  // nothing more to read, or a device that takes nothing
        auto n = std::min(static_cast<std::size_t>(result), size());
        if (direct && n < size()) {
            // The next direct transfer must begin aligned: go back to where it may; without any progress, end buffered.
            if (n < direct_alignment)
                direct = false;
            else
                n -= n % direct_alignment;
        }
        begin += n;
        return 0;
    }
};

/// Requests in the order in which they came. Thread-safe; allocates only when more requests wait than ever before.
class file_request_queue {
public:
    /// `code_of` makes the code of what finish was given.
    explicit file_request_queue(std::size_t expected, std::error_code (*code_of)(int) noexcept = last_system_error) : code_of_(code_of) {
        grow(std::max<std::size_t>(expected, 1));
    }

    /// Adds a transfer of at least one byte; its pieces are of `piece_bytes`, a multiple of the alignment, where they are
    /// direct. Returns the number of pieces, or 0 where there is no memory left (and the completion is not called).
    std::size_t push(file_transfer const& what, std::size_t piece_bytes) noexcept {
        std::lock_guard lock(mutex_);
        if (!free_) {
            try {
                grow(all_.size());
            } catch (std::bad_alloc const&) {
                return 0;
            }
        }
        auto* r = free_;
        free_ = r->next;
        r->what = what;
        r->direct_bytes = what.direct_bytes();
        r->piece_bytes = piece_bytes;
        r->claimed_bytes = 0;
        r->next = nullptr;
        r->error.store(0, std::memory_order_relaxed);
        auto pieces = (r->direct_bytes + piece_bytes - 1) / piece_bytes + (what.size_bytes > r->direct_bytes ? 1 : 0);
        r->unfinished.store(pieces, std::memory_order_relaxed);
        (first_ ? last_->next : first_) = r;
        last_ = r;
        return pieces;
    }

    /// Hands out the next piece; false when nothing waits.
    bool claim(file_piece& p) noexcept {
        std::lock_guard lock(mutex_);
        if (!first_) return false;
        auto* r = first_;
        p.request = r;
        p.begin = r->claimed_bytes;
        p.direct = p.begin < r->direct_bytes;
        p.end = p.direct ? std::min(p.begin + r->piece_bytes, r->direct_bytes) : r->what.size_bytes;
        r->claimed_bytes = p.end;
        if (p.end == r->what.size_bytes) first_ = r->next;
        return true;
    }

    /// Ends a piece with its error or 0, and the request with its last piece.
    void finish(file_piece const& p, int error) noexcept {
        auto* r = p.request;
        if (int none = 0; error != 0) r->error.compare_exchange_strong(none, error);
        if (r->unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        auto done = r->what.done;
        auto outcome = r->error.load(std::memory_order_relaxed);
        {
            std::lock_guard lock(mutex_);
            r->next = free_;
            free_ = r;
        }
        done(outcome == 0 ? std::error_code{} : code_of_(outcome));
    }

private:
    void grow(std::size_t count) {
        all_.reserve(all_.size() + count);
        for (std::size_t i = 0; i < count; ++i) {
            auto& r = all_.emplace_back(std::make_unique<file_request>());
            r->next = free_;
            free_ = r.get();
        }
    }

    std::error_code (*code_of_)(int) noexcept;
    std::mutex mutex_;
    std::vector<std::unique_ptr<file_request>> all_;
    file_request* free_ = nullptr;
    file_request* first_ = nullptr;
    file_request* last_ = nullptr;
};

}  // namespace varve::detail
