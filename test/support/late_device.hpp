#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <stop_token>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <varve/concepts/staging.hpp>
#include <varve/detail/digest.hpp>
#include <varve/detail/gather.hpp>
#include <varve/image.hpp>
#include <varve/staging/host.hpp>
#include <varve/state.hpp>

#include "gate.hpp"
#include "snapshot_rooms.hpp"

// A GPU as far as the order of its work goes, made of threads: what is enqueued is done later, and only what is ordered comes in order.
// So a machine without a GPU sees what the library may not overtake.

namespace varve_test {

/// Work that is done later, in its order, on a thread of its own. Its end is the end of all that was put there.
class late_stream {
public:
    late_stream() : thread_([this](std::stop_token stop) { run(stop); }) {}
    late_stream(late_stream const&) = delete;
    late_stream& operator=(late_stream const&) = delete;

    void put(std::function<void()> work) {
        {
            std::lock_guard lock(mutex_);
            work_.push_back(std::move(work));
        }
        changed_.notify_one();
    }

private:
    void run(std::stop_token stop) {
        for (;;) {
            std::function<void()> work;
            {
                std::unique_lock lock(mutex_);
                if (!changed_.wait(lock, stop, [&] { return !work_.empty(); })) return;
                work = std::move(work_.front());
                work_.pop_front();
            }
            work();
        }
    }

    std::mutex mutex_;
    std::condition_variable_any changed_;
    std::deque<std::function<void()>> work_;
    std::jthread thread_;
};

/// What a test may do to the copies of a late_staging, and what it sees of them.
struct late_control {
    std::chrono::microseconds delay{0};              ///< of each copy
    std::function<void(std::size_t layer)> taken{};  ///< called when a layer was put aside
    gate taking;                                     ///< of what is put aside, before it is enqueued
    std::atomic<int> takes{0};                       ///< that were enqueued
    std::atomic<int> from_tensors{0};                ///< copies that were enqueued
    std::atomic<int> ordered{0};                     ///< waits for a copy that were enqueued
    std::atomic<bool> refuses_order = false;         ///< such a wait cannot be enqueued
    bool hashes = true;                              ///< of snapshots
    std::atomic<int> fail_after{-1};                 ///< copies until one fails; -1: never
    std::atomic<int> waiting{0}, most_waiting{0};    ///< threads that wait for a copy, at once
};

/// A point in a stream's work; one that is of no stream has been reached.
class late_event {
public:
    late_event() = default;
    late_event(late_stream& of, std::shared_ptr<late_control> control) : late_event(std::move(control)) {
        of.put([s = state_] { reach(*s, {}); });
    }
    explicit late_event(std::shared_ptr<late_control> control) : state_(std::make_shared<state>()), control_(std::move(control)) {}

    std::error_code wait() const noexcept {
        if (!state_) return {};
        int const now = ++control_->waiting;
        for (int most = control_->most_waiting; most < now && !control_->most_waiting.compare_exchange_weak(most, now);) {
        }
        auto const error = pass();
        --control_->waiting;
        return error;
    }
    /// The same in a stream's work, which is no thread that waits.
    std::error_code pass() const noexcept {
        if (!state_) return {};
        std::unique_lock lock(state_->mutex);
        state_->reached.wait(lock, [&] { return state_->done; });
        return state_->error;
    }
    void reach(std::error_code error) const noexcept { reach(*state_, error); }
    friend bool operator==(late_event const& a, late_event const& b) noexcept { return a.state_ == b.state_; }

private:
    struct state {
        std::mutex mutex;
        std::condition_variable reached;
        bool done = false;
        std::error_code error;
    };
    static void reach(state& s, std::error_code error) noexcept {
        {
            std::lock_guard lock(s.mutex);
            s.done = true;
            s.error = error;
        }
        s.reached.notify_all();
    }

    std::shared_ptr<state> state_;
    std::shared_ptr<late_control> control_;
};

/// Copies that begin when what they follow is done, and end later; snapshots, hashed where they lie. Tensors that say
/// memory_kind::device are only touched by streams; in truth they are on the host.
class late_staging {
    struct shared {
        explicit shared(std::shared_ptr<late_control> c) : control(std::move(c)) {}
        std::shared_ptr<late_control> control;
        snapshot_rooms rooms;
        late_stream snapshots, copies;  ///< last: their work uses what stands above
    };

public:
    static constexpr varve::memory_kind memory = varve::memory_kind::host;
    struct order_type {
        late_stream* stream = nullptr;
    };
    using point_type = late_event;
    using token_type = late_event;
    using buffer_type = varve::host_staging::buffer_type;

    using snapshot_type = snapshot_rooms::slot;

    late_staging(std::size_t pool_bytes, std::size_t block_bytes, std::size_t snapshots = 0,
                 std::shared_ptr<late_control> control = std::make_shared<late_control>())
        : pool_(pool_bytes, block_bytes), most_(snapshots), shared_(std::make_shared<shared>(std::move(control))) {}

    std::size_t block_bytes() const { return pool_.block_bytes(); }
    std::size_t block_count() const { return pool_.block_count(); }
    std::span<std::span<std::byte> const> regions() const { return pool_.regions(); }
    buffer_type acquire(std::stop_token stop) { return pool_.acquire(stop); }

    point_type record(order_type order) noexcept { return order.stream ? late_event(*order.stream, shared_->control) : late_event(); }

    std::error_code order_after(token_type const& token, order_type order) noexcept {
        if (shared_->control->refuses_order) return std::make_error_code(std::errc::operation_not_supported);
        if (!order.stream) return token.wait();
        ++shared_->control->ordered;
        order.stream->put([token] { token.pass(); });
        return {};
    }

    token_type copy(buffer_type& into, std::span<varve::copy_range const> ranges, point_type const& after) noexcept {
        ++shared_->control->from_tensors;
        std::vector<varve::copy_range> later;
        auto* const to = into.data();
        for (auto const& r : ranges) {
            if (r.source->memory == varve::memory_kind::device)
                later.push_back(r);
            else
                varve::detail::gather(*r.source, r.source_offset_bytes, r.size_bytes, to + r.buffer_offset_bytes);
        }
        return enqueue(shared_->copies, [later = std::move(later), to, after] {
            auto const failed = after.pass();
            for (auto const& r : later) varve::detail::gather(*r.source, r.source_offset_bytes, r.size_bytes, to + r.buffer_offset_bytes);
            return failed;
        });
    }

    std::size_t prepare_snapshots(varve::image const& img, varve::state const& s, std::size_t count) {
        image_ = std::make_shared<varve::image const>(img);
        state_ = &s;
        count = std::min(count, most_);
        shared_->rooms.make(count, img.data_bytes());
        return count;
    }
    snapshot_type acquire_snapshot() noexcept { return shared_->rooms.acquire(); }
    token_type take(snapshot_type& into, std::span<std::size_t const> layers, std::span<point_type const> after) noexcept {
        shared_->control->taking.pass();
        auto const gather = [image = image_, state = state_, to = into.bytes().data(), of = std::vector(layers.begin(), layers.end())](bool device) {
            for (auto const& p : image->tensors)
                if (auto const& t = state->layers[p.layer].tensors[p.tensor];
                    std::count(of.begin(), of.end(), p.layer) > 0 && (t.memory == varve::memory_kind::device) == device)
                    varve::detail::gather(t, 0, p.size_bytes, to + p.offset_bytes - image->header_bytes);
        };
        gather(false);
        auto token = enqueue(shared_->snapshots, [gather, points = std::vector(after.begin(), after.end()), control = shared_->control.get(),
                                                  of = std::vector(layers.begin(), layers.end())] {
            for (auto const& p : points) p.pass();
            gather(true);
            for (auto layer : of)
                if (control->taken) control->taken(layer);
            return std::error_code();
        });
        ++shared_->control->takes;
        return token;
    }
    token_type copy(buffer_type& into, std::size_t at, snapshot_type const& from, std::uint64_t offset, std::size_t size,
                    token_type const& taken) noexcept {
        return enqueue(shared_->copies, [to = into.data() + at, source = from.bytes().data() + offset, size, taken] {
            auto const failed = taken.pass();
            std::memcpy(to, source, size);
            return failed;
        });
    }

    bool digests_snapshots() const noexcept { return shared_->control->hashes; }
    std::error_code digest(snapshot_type const& from, std::span<std::uint64_t> out) noexcept {
        late_event done(shared_->control);
        shared_->copies.put([bytes = std::span<std::byte const>(from.bytes()), out, done] {
            varve::detail::chunk_digests(bytes, out);
            done.reach({});
        });
        return done.pass();
    }

private:
    token_type enqueue(late_stream& in, std::function<std::error_code()> work) {
        token_type token(shared_->control);
        auto& control = *shared_->control;
        in.put([work = std::move(work), token, &control] {
            std::this_thread::sleep_for(control.delay);
            if (control.fail_after >= 0 && control.fail_after-- == 0) return token.reach(std::make_error_code(std::errc::bad_address));
            token.reach(work());
        });
        return token;
    }

    varve::host_staging pool_;
    std::size_t most_;
    std::shared_ptr<shared> shared_;
    std::shared_ptr<varve::image const> image_;
    varve::state const* state_ = nullptr;
};

static_assert(varve::snapshot_digesting_staging<late_staging>);

}  // namespace varve_test
