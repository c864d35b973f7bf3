#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <system_error>
#include <utility>

#include "varve/concepts/staging.hpp"
#include "varve/cuda/detail/digest.hpp"
#include "varve/cuda/detail/enqueue.hpp"
#include "varve/cuda/detail/gather.hpp"
#include "varve/cuda/detail/yielding_copies.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/error.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/snapshot.hpp"
#include "varve/cuda/stream_order.hpp"
#include "varve/cuda/transfer.hpp"
#include "varve/cuda/wait_meter.hpp"
#include "varve/detail/block_pool.hpp"
#include "varve/error.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"

namespace varve::cuda::detail {

/// What the stagings of tensors in GPU memory share, wherever their buffers are: streams and events of each device, the way to
/// the tensors, snapshots. What follows of `staging` is where the pool is, and copy.
class stream_staging {
public:
    using order_type = stream_order;
    using point_type = event;
    using token_type = event;
    using buffer_type = varve::detail::block_pool::buffer;
    using snapshot_type = snapshot_room::slot;

    std::size_t block_bytes() const noexcept { return shared_->pool->block_bytes(); }
    std::size_t block_count() const noexcept { return shared_->pool->count(); }
    std::span<std::span<std::byte> const> regions() const noexcept { return shared_->pool->regions(); }

    /// Waits for a free buffer; returns an empty one when `stop` is requested. Thread-safe.
    buffer_type acquire(std::stop_token stop) { return varve::detail::block_pool::acquire(shared_->pool, stop); }

    point_type record(order_type order) noexcept {
        relaxed_capture relaxed;
        if (auto ec = refuse_capture(order.stream)) return {nullptr, ec};
        device_scope on(order.device);
        int device = order.device;
        if (device < 0)
            if (auto ec = code_of(::cudaGetDevice(&device))) return {nullptr, ec};
        std::error_code failed;
        auto* of = shared_->on(device, failed);
        return of ? of->events->record(order.stream) : event(nullptr, failed);
    }

    std::error_code order_after(token_type const& token, order_type order) noexcept {
        // Of a save that was refused: a capture need not wait for it, and could not.
        if (!token.has_work()) return {};
        relaxed_capture relaxed;
        if (auto ec = refuse_capture(order.stream)) return ec;
        device_scope on(order.device);
        if (!shared_->measure_waits) return token.order(order.stream);
        int device = order.device;
        if (device < 0 && code_of(::cudaGetDevice(&device))) return token.order(order.stream);
        std::error_code failed;
        auto* of = shared_->on(device, failed);
        if (!of) return token.order(order.stream);
        return of->waits.around(order.stream, [&](cudaStream_t stream) { return token.order(stream); });
    }

    /// How long streams stood, by now, in the waits that order_after put into them; 0 unless the options ask for it.
    std::int64_t gpu_wait_ns() const noexcept {
        std::int64_t total = 0;
        if (!shared_->measure_waits) return total;
        std::lock_guard lock(shared_->mutex);
        for (auto& [index, d] : shared_->devices) total += d.waits.total_ns();
        return total;
    }

    /// The way to tensors on the calling thread's device, once the work in `order` is done. Throws error.
    std::unique_ptr<device_memory> reach(order_type order) const {
        device_scope on(order.device);
        return std::make_unique<transfer>(order.stream);
    }

    // ---- snapshots ----

    /// Takes min(count, the snapshots asked for) times the image's bytes of GPU memory, or less; describe() says how much, or why none.
    std::size_t prepare_snapshots(image const& img, state const& s, std::size_t count) {
        count = std::min(count, shared_->snapshots);
        if (count == 0 || img.data_bytes() == 0) return 0;
        try {
            shared_->room = std::make_shared<snapshot_room>(img, s, count, shared_->snapshot_share);
            shared_->why_no_snapshot = shared_->room->why();
            if (shared_->room->count() == 0) shared_->room.reset();
        } catch (error const& e) {
            shared_->why_no_snapshot = e.what();
        }
        return shared_->room ? shared_->room->count() : 0;
    }

    snapshot_type acquire_snapshot() noexcept {
        if (!shared_->room) return {};
        return shared_->room->acquire();
    }

    token_type take(snapshot_type& into, std::span<std::size_t const> layers, std::span<point_type const> after) noexcept {
        return shared_->room->take(into, layers, after);
    }

    token_type copy(buffer_type& into, std::size_t buffer_offset_bytes, snapshot_type const& from, std::uint64_t offset_bytes, std::size_t size_bytes,
                    token_type const& taken) noexcept {
        if (taken.failed()) return taken;
        relaxed_capture relaxed;
        auto const device = shared_->room->device();
        device_scope on(device);
        std::error_code failed;
        auto* of = shared_->on(device, failed);
        if (!of) return {nullptr, failed};
        return of->snapshot_copies.copy(into.data() + buffer_offset_bytes, shared_->room->memory(from) + offset_bytes, size_bytes, taken,
                                        shared_->pool_device.has_value());
    }

    /// Whether the kernel was compiled in.
    bool digests_snapshots() const noexcept { return has_kernels(); }
    /// See snapshot_digesting_staging: one kernel behind the copies, a chunk a block of threads.
    std::error_code digest(snapshot_type const& from, std::span<std::uint64_t> out) noexcept {
        relaxed_capture relaxed;
        auto const device = shared_->room->device();
        device_scope on(device);
        std::error_code failed;
        auto* of = shared_->on(device, failed);
        if (of) failed = of->snapshot_copies.last().order(of->copies.get());
        return failed ? failed : shared_->room->digest(from, out, of->copies.get());
    }

    /// GPU memory that the snapshots take.
    std::uint64_t snapshot_bytes() const noexcept { return shared_->room ? shared_->room->bytes() : 0; }

protected:
    /// Takes the pool, and what belongs to the device at hand, while it has memory; other devices get theirs at their first
    /// use. Throws error.
    stream_staging(std::shared_ptr<varve::detail::block_pool> pool, bool pool_on_gpu, std::size_t snapshots, double snapshot_share,
                   bool measure_waits)
        : shared_(std::make_shared<shared>()) {
        shared_->pool = std::move(pool);
        shared_->snapshots = snapshots;
        shared_->snapshot_share = snapshot_share;
        shared_->measure_waits = measure_waits;
        relaxed_capture relaxed;
        int device = 0;
        throw_if(::cudaGetDevice(&device), "the current device");
        if (pool_on_gpu) shared_->pool_device = device;
        std::error_code failed;
        if (!shared_->on(device, failed)) throw error(failed, "a stream for copies on GPU " + std::to_string(device) + ": " + failed.message());
    }
    ~stream_staging() = default;
    stream_staging(stream_staging&&) = default;
    stream_staging& operator=(stream_staging&&) = default;

    /// The end of describe(): the snapshots and what GPU memory they take, or why there are none.
    std::string describe_snapshots() const {
        std::string text;
        if (shared_->room)
            text += "; " + std::to_string(shared_->room->count()) + (shared_->room->count() == 1 ? " snapshot" : " snapshots") + " in " +
                    std::to_string(snapshot_bytes() / 1'000'000) + " MB of GPU " + std::to_string(shared_->room->device()) +
                    (has_kernels() ? ", hashed there" : ", one copy a tensor (built without nvcc)");
        if (shared_->snapshots != 0 && !shared_->why_no_snapshot.empty())
            text += (shared_->room ? "; no more: " : "; no snapshot: ") + shared_->why_no_snapshot;
        return text;
    }

private:
    struct on_device {
        on_device() {
            if (!has_kernels()) return;
            throw_if(load_gather(), "the kernels for copies");
            throw_if(load_chunk_digests(), "the kernel for digests");
        }
        side_stream copies{true};
        std::shared_ptr<event_pool> events = std::make_shared<event_pool>();
        wait_meter waits;
        yielding_copies snapshot_copies{events};  ///< the copying thread's
    };

    struct shared {
        std::shared_ptr<varve::detail::block_pool> pool;
        std::optional<int> pool_device;  ///< of a pool in GPU memory
        std::size_t snapshots = 0;
        double snapshot_share = 0;
        bool measure_waits = false;
        std::shared_ptr<snapshot_room> room;
        std::string why_no_snapshot;
        std::mutex mutex;
        std::map<int, on_device> devices;

        ~shared() {
            for (auto& [index, d] : devices) ::cudaStreamSynchronize(d.copies.get());
        }

        /// What belongs to the device that the calling thread is on; made at its first use.
        on_device* on(int device, std::error_code& failed) noexcept {
            try {
                std::lock_guard lock(mutex);
                return &devices.try_emplace(device).first->second;
            } catch (error const& e) {
                failed = e.code();
            } catch (std::bad_alloc const&) {
                failed = std::make_error_code(std::errc::not_enough_memory);
            }
            return nullptr;
        }
    };

protected:
    /// The copies of one call, which may be in the streams of several devices.
    class issued_copies {
    public:
        issued_copies(stream_staging const& s, event const& after) noexcept : shared_(*s.shared_), after_(after) {}

        std::error_code add(copy_range const& r, std::byte* to) noexcept {
            int device = 0;
            if (auto ec = device_of(r.source->data, device)) return ec;
            if (device != device_) {
                // Almost never: a layer's tensors on several devices.
                if (on_) before_ = chain(before_, on_->events->mark(on_->copies.get(), {}));
                scope_.emplace(device);
                device_ = device;
                std::error_code failed;
                on_ = shared_.on(device, failed);
                if (!on_) return failed;
                if (auto ec = after_.order(on_->copies.get())) return ec;
            }
            // A kernel of another GPU's that may not write there would break that GPU's context; a copy just fails.
            return enqueue(*r.source, r.source_offset_bytes, r.size_bytes, to, on_->copies.get(), shared_.pool_device.value_or(device) == device);
        }

        /// Copies that were issued elsewhere belong to these.
        void join(event const& others) noexcept { before_ = chain(before_, others); }

        event finish(std::error_code failed) noexcept {
            if (!on_) return failed ? chain(before_, event(nullptr, failed)) : before_;
            if (auto ec = before_.order(on_->copies.get()); ec && !failed) failed = ec;
            if (!failed) failed = before_.failed();
            return on_->events->mark(on_->copies.get(), failed);
        }

    private:
        /// Both: the later one waits for the earlier one's device.
        event chain(event const& earlier, event const& later) noexcept {
            if (earlier == event()) return later;
            if (on_ && !earlier.order(on_->copies.get())) return on_->events->mark(on_->copies.get(), later.failed());
            earlier.wait();
            return later;
        }

        shared& shared_;
        event const& after_;
        event before_;
        int device_ = -1;
        on_device* on_ = nullptr;
        std::optional<device_scope> scope_;
    };

private:
    std::shared_ptr<shared> shared_;
};

}  // namespace varve::cuda::detail
