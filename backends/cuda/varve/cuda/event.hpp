#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/cuda/device.hpp"
#include "varve/cuda/error.hpp"

namespace varve::cuda {

/// A point in a stream's work; copies are the same point, and the last one hands the event on to the next.
///
/// One that holds an error stands for work that was never issued.
class event {
public:
    event() noexcept = default;
    event(std::shared_ptr<CUevent_st> recorded, std::error_code failed) noexcept : event_(std::move(recorded)), failed_(failed) {}

    /// Whether there is work to wait for.
    bool has_work() const noexcept { return event_ != nullptr; }
    /// Why there is nothing, or not all, to wait for.
    std::error_code failed() const noexcept { return failed_; }

    /// Waits until the work is done, on the host; its error, or that of the device. Thread-safe, again and again.
    std::error_code wait() const noexcept {
        if (!event_) return failed_;
        relaxed_capture relaxed;
        auto ec = code_of(::cudaEventSynchronize(event_.get()));
        return failed_ ? failed_ : ec;
    }

    /// Makes later work in `stream` wait for it, on the device.
    std::error_code order(cudaStream_t stream) const noexcept {
        if (!event_) return {};
        return code_of(::cudaStreamWaitEvent(stream, event_.get(), 0));
    }

    event with(std::error_code failed) const noexcept { return {event_, failed}; }

    friend bool operator==(event const& a, event const& b) noexcept { return a.event_ == b.event_ && a.failed_ == b.failed_; }

private:
    std::shared_ptr<CUevent_st> event_;
    std::error_code failed_;
};

/// Who waits for an event. For one that threads sleep on the GPU interrupts a processor, whether or not one does: 0.03 ms of
/// the driver's own thread. A thread that waits for another spins.
enum class awaited_by { threads, streams };

/// The events of one device, made as they are needed and used again. Thread-safe.
class event_pool : public std::enable_shared_from_this<event_pool> {
public:
    /// For the device that the calling thread is on; `ready` events are made at once, while there is memory. Throws error.
    explicit event_pool(std::size_t ready = 64, awaited_by by = awaited_by::threads) : event_pool(empty{}, by) {
        free_.reserve(ready);
        for (; made_ < ready; ++made_) free_.push_back(make());
    }
    ~event_pool() {
        for (auto e : free_) ::cudaEventDestroy(e);
    }
    event_pool(event_pool const&) = delete;
    event_pool& operator=(event_pool const&) = delete;

    /// All work that is in `stream` by now.
    event record(cudaStream_t stream) noexcept {
        try {
            std::shared_ptr<CUevent_st> e(take(), [self = shared_from_this()](cudaEvent_t freed) { self->give_back(freed); });
            if (auto ec = code_of(::cudaEventRecord(e.get(), stream))) return {nullptr, ec};
            return {std::move(e), {}};
        } catch (error const& e) {
            return {nullptr, e.code()};
        } catch (std::bad_alloc const&) {
            return {nullptr, std::make_error_code(std::errc::not_enough_memory)};
        }
    }

    /// The same for copies in a stream of varve's own, as far as they were issued: `failed` says why not all were. Where no
    /// event can be had it waits until they are done, so that nobody takes memory back that they still use.
    event mark(cudaStream_t stream, std::error_code failed) noexcept {
        auto e = record(stream);
        if (e.failed()) {
            ::cudaStreamSynchronize(stream);
            return failed ? event(nullptr, failed) : e;
        }
        return failed ? e.with(failed) : e;
    }

private:
    /// From here on the destructor runs, so that those made before one fails are given back.
    struct empty {};
    event_pool(empty, awaited_by by) noexcept
        : flags_(cudaEventDisableTiming | (by == awaited_by::threads ? cudaEventBlockingSync : cudaEventDefault)) {}

    cudaEvent_t make() const {
        cudaEvent_t e = nullptr;
        throw_if(::cudaEventCreateWithFlags(&e, flags_), "an event");
        return e;
    }
    cudaEvent_t take() {
        std::lock_guard lock(mutex_);
        if (free_.empty()) {
            free_.reserve(made_ + 1);
            auto e = make();
            ++made_;
            return e;
        }
        auto e = free_.back();
        free_.pop_back();
        return e;
    }
    void give_back(cudaEvent_t e) noexcept {
        std::lock_guard lock(mutex_);
        free_.push_back(e);
    }

    unsigned const flags_;
    std::mutex mutex_;
    std::vector<cudaEvent_t> free_;  ///< with room for all that were made
    std::size_t made_ = 0;
};

}  // namespace varve::cuda
