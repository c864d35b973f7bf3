#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <utility>

#include "varve/cuda/detail/enqueue.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/gather.hpp"
#include "varve/device_memory.hpp"

namespace varve::cuda {

/// Copies between host memory and tensors on one GPU, through page-locked pieces of 1 MiB: while one is on its way to the
/// GPU, the caller fills the next. Writes follow the work that was in `after` when this was made, reads what is in it then.
class transfer final : public device_memory {
public:
    /// For the calling thread's device. Throws error.
    explicit transfer(cudaStream_t after) : after_(after) {
        relaxed_capture relaxed;
        throw_if(::cudaGetDevice(&device_), "the current device");
        stream_.emplace(false);
        events_ = std::make_shared<event_pool>(pieces);
        auto point = events_->record(after);
        varve::throw_if(point.failed(), "the training's stream");
        varve::throw_if(point.wait(), "the training's stream");
        for (std::size_t i = 0; i < pieces; ++i) free_.push_back({page_locked(piece_bytes), {}});
    }
    ~transfer() override { ::cudaStreamSynchronize(stream_->get()); }

    void write(tensor const& to, std::uint64_t offset_bytes, std::span<std::byte const> bytes) override {
        relaxed_capture relaxed;
        device_scope on(device_);
        for (std::size_t at = 0; at < bytes.size(); at += piece_bytes) {
            auto const n = std::min(piece_bytes, bytes.size() - at);
            auto p = take();
            auto failed = p.busy.wait();
            std::memcpy(p.memory.data(), bytes.data() + at, n);
            if (!failed)
                varve::detail::for_each_run(to, offset_bytes + at, n, [&](std::byte* address, std::size_t in_piece, std::size_t size) {
                    if (!failed) failed = code_of(::cudaMemcpyAsync(address, p.memory.data() + in_piece, size, cudaMemcpyDefault, stream_->get()));
                });
            p.busy = events_->mark(stream_->get(), failed);
            if (!failed) failed = p.busy.failed();
            give_back(std::move(p));
            varve::throw_if(failed, "cannot write " + to.name);
        }
    }

    void finish() override { throw_if(::cudaStreamSynchronize(stream_->get()), "copies to the GPU"); }

    void read(tensor const& from, std::uint64_t offset_bytes, std::span<std::byte> out) override {
        relaxed_capture relaxed;
        device_scope on(device_);
        for (std::size_t at = 0; at < out.size(); at += piece_bytes) {
            auto const n = std::min(piece_bytes, out.size() - at);
            auto p = take();
            auto failed = p.busy.wait();
            if (!failed) failed = order();
            if (!failed) failed = detail::enqueue(from, offset_bytes + at, n, p.memory.data(), stream_->get());
            p.busy = events_->mark(stream_->get(), failed);
            failed = p.busy.wait();
            if (!failed) std::memcpy(out.data() + at, p.memory.data(), n);
            give_back(std::move(p));
            varve::throw_if(failed, "cannot read " + from.name);
        }
    }

private:
    static constexpr std::size_t piece_bytes = 1u << 20;
    static constexpr std::size_t pieces = 32;

    struct piece {
        page_locked memory;
        event busy;  ///< until then the GPU reads it
    };

    std::error_code order() noexcept {
        auto point = events_->record(after_);
        return point.failed() ? point.failed() : point.order(stream_->get());
    }

    piece take() {
        std::unique_lock lock(mutex_);
        freed_.wait(lock, [&] { return !free_.empty(); });
        auto p = std::move(free_.front());
        free_.pop_front();
        return p;
    }
    void give_back(piece p) {
        {
            std::lock_guard lock(mutex_);
            // One that failed is no reason for the next to fail.
            if (p.busy.failed()) p.busy = {};
            free_.push_back(std::move(p));
        }
        freed_.notify_one();
    }

    cudaStream_t after_;
    int device_ = 0;
    std::optional<side_stream> stream_;
    std::shared_ptr<event_pool> events_;
    std::mutex mutex_;
    std::condition_variable freed_;
    std::deque<piece> free_;  ///< that which was used longest ago first
};

}  // namespace varve::cuda
