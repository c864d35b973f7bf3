#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <system_error>
#include <utility>

#include "varve/cuda/device.hpp"
#include "varve/cuda/error.hpp"
#include "varve/cuda/event.hpp"

namespace varve::cuda::detail {

/// Long copies to the host that let others through, such as that of a training's loss: pieces on two streams in turn, each
/// behind the one before it. A copy engine stays with a stream for as long as that has copies for it, whatever the
/// priorities; between two pieces it turns to others. Copies within the GPU, which are over in a moment, stay whole. One
/// thread's at a time. Source: bench/README.md, "The copy engine".
class yielding_copies {
public:
    static constexpr std::size_t to_host_bytes = 8u << 20;  ///< of a piece

    /// On the calling thread's device; `events` are for whoever waits for a copy. Throws error.
    explicit yielding_copies(std::shared_ptr<event_pool> events) : events_(std::move(events)) {}
    yielding_copies(yielding_copies const&) = delete;
    yielding_copies& operator=(yielding_copies const&) = delete;
    ~yielding_copies() { wait(); }

    /// Copies once `after` is reached and all copies before it are done.
    event copy(std::byte* to, std::byte const* from, std::size_t size_bytes, event const& after, bool within_gpu) noexcept {
        std::error_code failed;
        auto const piece_bytes = within_gpu ? size_bytes : to_host_bytes;
        for (std::size_t at = 0; at < size_bytes; at += piece_bytes) {
            auto const stream = streams_[++turn_ % streams_.size()].get();
            failed = last_.order(stream);
            // What follows such a copy follows what that one waited for.
            if (!failed && !(after == after_)) failed = after.order(stream);
            if (!failed) failed = code_of(::cudaMemcpyAsync(to + at, from + at, std::min(piece_bytes, size_bytes - at), cudaMemcpyDefault, stream));
            if (failed) break;
            last_ = (at + piece_bytes < size_bytes ? *between_ : *events_).mark(stream, {});
            if ((failed = last_.failed())) break;
            after_ = after;
        }
        if (!failed) return last_;
        // Nobody may take the memory back that those before it still use.
        wait();
        last_ = after_ = {};
        return {nullptr, failed};
    }

    /// All copies so far.
    event const& last() const noexcept { return last_; }

private:
    void wait() noexcept {
        relaxed_capture relaxed;
        for (auto& s : streams_) ::cudaStreamSynchronize(s.get());
    }

    std::shared_ptr<event_pool> events_;
    std::shared_ptr<event_pool> between_ = std::make_shared<event_pool>(2, awaited_by::streams);  ///< for the next piece
    std::array<side_stream, 2> streams_{side_stream(true), side_stream(true)};
    std::size_t turn_ = 0;
    event after_, last_;
};

}  // namespace varve::cuda::detail
