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

/// Copies between host memory and tensors on one GPU, through page-locked pieces: while some are on their way to the GPU, the
/// callers fill others. Writes follow the work that was in `after` when this was made, reads what is in it then.
class transfer final : public device_memory {
public:
    /// For the calling thread's device. The pieces are cut from `memory`, page-locked stretches that `owner` keeps; where there
    /// are none they are allocated as they are needed. Throws error.
    explicit transfer(cudaStream_t after, std::span<std::span<std::byte> const> memory = {}, std::shared_ptr<void> owner = nullptr)
        : after_(after), owner_(std::move(owner)), may_allocate_(memory.empty()) {
        relaxed_capture relaxed;
        throw_if(::cudaGetDevice(&device_), "the current device");
        stream_.emplace(false);
        events_ = std::make_shared<event_pool>(most_pieces);
        auto point = events_->record(after);
        varve::throw_if(point.failed(), "the training's stream");
        varve::throw_if(point.wait(), "the training's stream");
        for (auto stretch : memory)
            for (; stretch.size() >= piece_bytes; stretch = stretch.subspan(piece_bytes)) free_.push_back({stretch.first(piece_bytes), {}});
    }
    ~transfer() override { ::cudaStreamSynchronize(stream_->get()); }

    std::span<std::byte> borrow() override {
        auto p = take();
        if (auto failed = p.busy.wait()) {
            give_back({p.memory, {}});
            varve::throw_if(failed, "copies to the GPU");
        }
        return p.memory;
    }

    void write(tensor const& to, std::uint64_t offset_bytes, std::span<std::byte const> bytes) override {
        relaxed_capture relaxed;
        device_scope on(device_);
        std::error_code failed;
        varve::detail::for_each_run(to, offset_bytes, bytes.size(), [&](std::byte* address, std::size_t at, std::size_t size) {
            if (!failed) failed = code_of(::cudaMemcpyAsync(address, bytes.data() + at, size, cudaMemcpyDefault, stream_->get()));
        });
        varve::throw_if(failed, "cannot write " + to.name);
    }

    void give_back(std::span<std::byte> memory) noexcept override {
        relaxed_capture relaxed;
        device_scope on(device_);
        give_back({memory, events_->mark(stream_->get(), {})});
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
    static constexpr std::size_t most_pieces = 16;  ///< of its own

    struct piece {
        std::span<std::byte> memory;
        event busy;  ///< until then the GPU reads it
    };

    std::error_code order() noexcept {
        auto point = events_->record(after_);
        return point.failed() ? point.failed() : point.order(stream_->get());
    }

    /// The one that was used longest ago, or a new one while there are few.
    piece take() {
        std::unique_lock lock(mutex_);
        if (free_.empty() && may_allocate_ && own_.size() < most_pieces) {
            own_.emplace_back(piece_bytes);
            return {own_.back().bytes(), {}};
        }
        freed_.wait(lock, [&] { return !free_.empty(); });
        auto p = std::move(free_.front());
        free_.pop_front();
        return p;
    }
    void give_back(piece p) noexcept {
        {
            std::lock_guard lock(mutex_);
            // One that failed is no reason for the next to fail.
            if (p.busy.failed()) p.busy = {};
            free_.push_back(std::move(p));
        }
        freed_.notify_one();
    }

    cudaStream_t after_;
    std::shared_ptr<void> owner_;
    int device_ = 0;
    std::optional<side_stream> stream_;
    std::shared_ptr<event_pool> events_;
    std::deque<page_locked> own_;
    std::mutex mutex_;
    std::condition_variable freed_;
    std::deque<piece> free_;  ///< that which was used longest ago first
    bool const may_allocate_;
};

}  // namespace varve::cuda
