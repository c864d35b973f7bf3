#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <system_error>
#include <utility>

#include "varve/concepts/staging.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/gather.hpp"

namespace varve::gds::detail {

/// Tensors in host memory on their way to a buffer in GPU memory: read at once, into page-locked pieces, and copied from
/// there in a stream of its own, which waits for no training. For one thread at a time.
class uploads {
public:
    /// For the calling thread's device. Throws error.
    explicit uploads(std::shared_ptr<cuda::event_pool> events) : events_(std::move(events)) {}
    ~uploads() { ::cudaStreamSynchronize(stream_.get()); }

private:
    static constexpr std::size_t piece_bytes = 1u << 20;

    struct piece {
        cuda::page_locked memory{piece_bytes};
        cuda::event busy{};  ///< until then the GPU reads it
    };

public:
    /// Those of one call to copy: small ranges share a piece. On the thread of the device that the buffers are on.
    class batch {
    public:
        explicit batch(uploads& u) noexcept : all_(u) {}
        ~batch() { finish({}); }
        batch(batch const&) = delete;
        batch& operator=(batch const&) = delete;

        std::error_code add(copy_range const& r, std::byte* to) noexcept {
            for (std::size_t done = 0; done < r.size_bytes;) {
                if (used_ == piece_bytes) hand_on();
                if (!piece_) {
                    piece_ = &all_.pieces_[all_.next_++ % all_.pieces_.size()];
                    used_ = 0;
                    if (auto ec = std::exchange(piece_->busy, {}).wait()) return ec;
                }
                auto const n = std::min(r.size_bytes - done, piece_bytes - used_);
                auto* from = piece_->memory.data() + used_;
                varve::detail::gather(*r.source, r.source_offset_bytes + done, n, from);
                if (auto ec = cuda::code_of(::cudaMemcpyAsync(to + done, from, n, cudaMemcpyDefault, all_.stream_.get()))) return ec;
                used_ = std::min(piece_bytes, (used_ + n + 15) / 16 * 16);
                done += n;
            }
            return {};
        }

        /// When all of them are there; `failed` says why not all were issued.
        cuda::event finish(std::error_code failed) noexcept {
            if (!piece_) return last_;
            hand_on();
            return failed ? last_.with(failed) : last_;
        }

    private:
        void hand_on() noexcept {
            last_ = all_.events_->mark(all_.stream_.get(), {});
            piece_->busy = last_;
            piece_ = nullptr;
            used_ = 0;
        }

        uploads& all_;
        piece* piece_ = nullptr;
        std::size_t used_ = 0;
        cuda::event last_;
    };

private:
    cuda::side_stream stream_{true};
    std::shared_ptr<cuda::event_pool> events_;
    std::array<piece, 4> pieces_;
    std::size_t next_ = 0;
};

}  // namespace varve::gds::detail
