#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/cuda/detail/enqueue.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/gather.hpp"
#include "varve/device_memory.hpp"

namespace varve::cuda {

/// Copies between host memory and tensors on one GPU, through page-locked pieces: while some are on their way to the GPU, the
/// callers fill others, and while a reader's caller has one, the next are on their way from it. Writes follow the work that was
/// in `after` when this was made, a reader's reads what is in it at its first call.
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
        auto p = take(true);
        if (auto failed = p->busy.wait()) {
            give_back({p->memory, {}});
            varve::throw_if(failed, "copies to the GPU");
        }
        return p->memory;
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

    std::unique_ptr<reader> read(std::vector<tensor const*> from) override { return std::make_unique<reading>(*this, std::move(from)); }

private:
    static constexpr std::size_t most_pieces = 16;  ///< of its own

    struct piece {
        std::span<std::byte> memory;
        event busy;  ///< until then the GPU uses it
    };

    /// While the caller has one piece, the next are on their way.
    class reading final : public reader {
    public:
        reading(transfer& way, std::vector<tensor const*> from) : way_(way), from_(std::move(from)) { under_way_.reserve(most_under_way); }
        ~reading() override {
            give_back_current();
            for (auto& p : under_way_) {
                p.held.busy.wait();
                way_.give_back(std::move(p.held));
            }
        }

        std::span<std::byte const> next() override {
            relaxed_capture relaxed;
            device_scope on(way_.device_);
            give_back_current();
            while (under_way_.size() < most_under_way && has_more())
                if (!begin_one(under_way_.empty())) break;
            if (under_way_.empty()) return {};
            current_ = std::move(under_way_.front());
            under_way_.erase(under_way_.begin());
            if (auto failed = current_->held.busy.wait()) {
                from_.clear();
                throw error(failed, "cannot read " + current_->from->name + ": " + failed.message());
            }
            return current_->held.memory.first(current_->size_bytes);
        }

    private:
        static constexpr std::size_t read_bytes = 4u << 20;  ///< at once, most of a piece
        static_assert(read_bytes <= piece_bytes);
        static constexpr std::size_t most_under_way = 3;  ///< the caller's next one, and what keeps the copies going meanwhile
        struct part {
            piece held;
            tensor const* from;
            std::size_t size_bytes;
        };

        bool has_more() {
            while (tensor_ < from_.size() && at_ == from_[tensor_]->size_bytes()) {
                ++tensor_;
                at_ = 0;
            }
            return tensor_ < from_.size();
        }
        /// False where no piece is free and it was not to wait for one.
        bool begin_one(bool wait) {
            auto free = way_.take(wait);
            if (!free) return false;
            auto const& t = *from_[tensor_];
            auto const size = static_cast<std::size_t>(std::min<std::uint64_t>(read_bytes, t.size_bytes() - at_));
            auto failed = free->busy.wait();
            if (!failed && !std::exchange(ordered_, true)) failed = way_.order();
            if (!failed) failed = detail::enqueue(t, at_, size, free->memory.data(), way_.stream_->get());
            free->busy = way_.events_->mark(way_.stream_->get(), failed);
            under_way_.push_back({std::move(*free), &t, size});
            at_ += size;
            return true;
        }
        void give_back_current() noexcept {
            if (!current_) return;
            way_.give_back(std::move(current_->held));
            current_.reset();
        }

        transfer& way_;
        std::vector<tensor const*> from_;
        std::size_t tensor_ = 0;  ///< of from_, to begin with next
        std::uint64_t at_ = 0;    ///< in it
        bool ordered_ = false;    ///< behind the work that the tensors are written by
        std::vector<part> under_way_;
        std::optional<part> current_;  ///< the caller has it
    };

    std::error_code order() noexcept {
        auto point = events_->record(after_);
        return point.failed() ? point.failed() : point.order(stream_->get());
    }

    /// The one that was used longest ago, or a new one while there are few; none where it would have to wait and may not.
    std::optional<piece> take(bool wait) {
        std::unique_lock lock(mutex_);
        if (free_.empty() && may_allocate_ && own_.size() < most_pieces) {
            try {
                own_.push_back(page_locked::in_huge_pages(piece_bytes));
                return piece{own_.back().bytes(), {}};
            } catch (error const&) {
                // With those that there are it takes longer.
                if (own_.empty()) throw;
            }
        }
        if (free_.empty() && !wait) return {};
        freed_.wait(lock, [&] { return !free_.empty(); });
        std::optional p = std::move(free_.front());
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
