#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/cuda/detail/digest.hpp"
#include "varve/cuda/detail/enqueue.hpp"
#include "varve/cuda/detail/gather.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/gather.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"

namespace varve::cuda {

static_assert(detail::chunk_bytes == digest_chunk_bytes);

/// Room in GPU memory for whole saves, and what is to be put there: the image's data as one stretch of bytes.
///
/// One launch gathers the layers, on a stream of its own beside the training's work: a table of 64 KiB pieces, made once
/// since addresses stay put. Tensors in host memory go through a page-locked mirror, which the same launch reads. Without
/// the kernel it is one copy a tensor. Digests are computed where the bytes lie. For states whose GPU tensors lie on one device.
class snapshot_room : public std::enable_shared_from_this<snapshot_room> {
public:
    /// Room for one save; gives itself back, when all copies from it are done. What is taken next follows in the stream.
    class slot {
    public:
        slot() noexcept = default;
        slot(slot&& other) noexcept : room_(std::move(other.room_)), index_(other.index_) {}
        slot& operator=(slot&& other) noexcept {
            if (this != &other) {
                reset();
                room_ = std::move(other.room_);
                index_ = other.index_;
            }
            return *this;
        }
        ~slot() { reset(); }
        explicit operator bool() const noexcept { return room_ != nullptr; }

    private:
        friend class snapshot_room;
        slot(std::shared_ptr<snapshot_room> room, std::size_t index) noexcept : room_(std::move(room)), index_(index) {}
        void reset() noexcept {
            if (!room_) return;
            {
                std::lock_guard lock(room_->mutex_);
                room_->free_.push_back(index_);
            }
            room_.reset();
        }
        std::shared_ptr<snapshot_room> room_;
        std::size_t index_ = 0;
    };

    /// Makes room for up to `count` saves in at most `share` of the memory that is free; why() says what was in the way
    /// of more. Throws error with the code of CUDA, or errc::unsupported where GPU tensors lie on several devices or nowhere.
    snapshot_room(image const& img, state const& s, std::size_t count, double share) : bytes_(img.data_bytes()) {
        plan(img, s);
        if (device_ < 0) throw error(errc::unsupported, "no tensor lies in GPU memory");
        device_scope on(device_);
        relaxed_capture relaxed;
        stream_.emplace(false);
        taken_ = std::make_shared<event_pool>(64, awaited_by::streams);
        hashed_ = std::make_shared<event_pool>(1);
        if (detail::has_kernels()) {
            throw_if(detail::load_gather(), "the snapshot's kernels");
            throw_if(detail::load_chunk_digests(), "the snapshot's kernels");
            upload_table();
            digests_ = page_locked(varve::detail::chunk_count(bytes_) * sizeof(std::uint64_t));
        }
        std::size_t free_bytes = 0, total_bytes = 0;
        throw_if(::cudaMemGetInfo(&free_bytes, &total_bytes), "free GPU memory");
        auto const most_bytes = static_cast<std::uint64_t>(static_cast<double>(free_bytes) * share);
        while (slots_.size() < count) {
            if ((slots_.size() + 1) * bytes_ > most_bytes) {
                why_ = "GPU " + std::to_string(device_) + " has " + megabytes(free_bytes) + " free, of which snapshots may take " +
                       megabytes(most_bytes);
                break;
            }
            try {
                slots_.push_back({stream_memory(bytes_, stream_->get()), mirror_bytes_ > 0 ? page_locked(mirror_bytes_) : page_locked()});
            } catch (error const& e) {
                why_ = e.what();
                break;
            }
        }
        free_.reserve(slots_.size());
        for (std::size_t i = slots_.size(); i-- > 0;) free_.push_back(i);
    }

    snapshot_room(snapshot_room const&) = delete;
    snapshot_room& operator=(snapshot_room const&) = delete;

    std::size_t count() const noexcept { return slots_.size(); }
    std::uint64_t bytes() const noexcept { return bytes_ * slots_.size(); }
    int device() const noexcept { return device_; }
    std::string const& why() const noexcept { return why_; }

    /// An empty one where none is free. Thread-safe.
    slot acquire() noexcept {
        std::lock_guard lock(mutex_);
        if (free_.empty()) return {};
        auto index = free_.back();
        free_.pop_back();
        slots_[index].failed = {};
        return {shared_from_this(), index};
    }

    std::byte const* memory(slot const& s) const noexcept { return slots_[s.index_].memory.data(); }

    /// Puts the digest of each chunk of what is in the slot by then to `out`, once the work in `stream` so far is done; they are
    /// there when it returns. One thread's at a time, on this device.
    std::error_code digest(slot const& from, std::span<std::uint64_t> out, cudaStream_t stream) noexcept {
        // What was not put there is nothing to be read.
        if (slots_[from.index_].failed) return slots_[from.index_].failed;
        auto* const found = reinterpret_cast<std::uint64_t*>(digests_.data());
        auto failed = code_of(detail::chunk_digests(memory(from), bytes_, found, stream));
        failed = hashed_->mark(stream, failed).wait();
        if (!failed) std::copy_n(found, varve::detail::chunk_count(bytes_), out.begin());
        return failed;
    }

    /// Gathers the layers once the work before the points is done.
    event take(slot const& into, std::span<std::size_t const> layers, std::span<event const> points) noexcept {
        auto taken = gather_layers(into, layers, points);
        if (taken.failed()) slots_[into.index_].failed = taken.failed();
        return taken;
    }

private:
    event gather_layers(slot const& into, std::span<std::size_t const> layers, std::span<event const> points) noexcept {
        relaxed_capture relaxed;
        device_scope on(device_);
        auto const& to = slots_[into.index_];
        auto const stream = stream_->get();
        for (std::size_t i = 0; i < points.size(); ++i) {
            if (points[i].failed()) return {nullptr, points[i].failed()};
            if (i > 0 && points[i] == points[i - 1]) continue;
            if (auto ec = points[i].order(stream)) return taken_->mark(stream, ec);
        }
        for (std::size_t i = 0; i < layers.size(); ++i)
            for (auto const& t : hosts_of_[layers[i]]) {
                if (t.pinned)
                    if (auto ec = points[i].wait()) return taken_->mark(stream, ec);
                auto* const copy = to.mirror.data() + t.mirror_offset;
                if (t.contiguous)
                    std::memcpy(copy, t.contiguous, t.size_bytes);
                else
                    varve::detail::gather(*t.source, 0, t.size_bytes, copy);
            }
        std::error_code failed;
        for (std::size_t i = 0; i < layers.size() && !failed;) {
            auto const first = layers[i];
            std::size_t next = first;
            for (; i < layers.size() && layers[i] == next; ++i) ++next;
            failed = gather(first, next, to);
        }
        return taken_->mark(stream, failed);
    }

    struct place {
        tensor const* source;
        std::uint64_t offset;         ///< in the image's data
        std::uint64_t mirror_offset;  ///< of tensors in host memory
        // What every save needs of those, so that it does not go through hundreds of tensors' descriptions.
        std::size_t size_bytes;
        std::byte const* contiguous;  ///< their bytes, if they lie side by side
        bool pinned;
    };
    struct memory_of {
        stream_memory memory;
        page_locked mirror;
        std::error_code failed{};  ///< why what was last to be put there is not, or not all
    };

    static std::string megabytes(std::uint64_t bytes) { return std::to_string(bytes / 1'000'000) + " MB"; }

    void plan(image const& img, state const& s) {
        auto const layers = s.layers.size();
        first_piece_.assign(layers + 1, 0);
        tensors_of_.resize(layers);
        hosts_of_.resize(layers);
        for (auto const& placed : img.tensors) {
            auto const& t = s.layers[placed.layer].tensors[placed.tensor];
            if (placed.size_bytes == 0) continue;
            place p{&t,
                    placed.offset_bytes - img.header_bytes,
                    mirror_bytes_,
                    placed.size_bytes,
                    varve::detail::is_contiguous(t) ? static_cast<std::byte const*>(t.data) : nullptr,
                    t.memory == memory_kind::pinned};
            if (t.memory == memory_kind::device) {
                int device = 0;
                varve::throw_if(detail::device_of(t.data, device), t.name);
                if (device_ >= 0 && device != device_) throw error(errc::unsupported, "the tensors lie on several GPUs");
                device_ = device;
                tensors_of_[placed.layer].push_back(p);
            } else {
                hosts_of_[placed.layer].push_back(p);
                mirror_bytes_ += (placed.size_bytes + 15) / 16 * 16;
            }
        }
    }

    void upload_table() {
        std::vector<detail::piece> pieces;
        auto cut = [&](std::uint64_t source, std::uint64_t target, std::uint64_t size, bool from_mirror) {
            for (std::uint64_t done = 0; done < size; done += detail::largest_piece_bytes)
                pieces.push_back({source + done, target + done,
                                  static_cast<std::uint32_t>(std::min<std::uint64_t>(detail::largest_piece_bytes, size - done)),
                                  from_mirror ? 1u : 0u});
        };
        for (std::size_t l = 0; l < tensors_of_.size(); ++l) {
            first_piece_[l] = pieces.size();
            for (auto const& p : tensors_of_[l])
                if (varve::detail::is_contiguous(*p.source))
                    cut(reinterpret_cast<std::uint64_t>(p.source->data), p.offset, p.source->size_bytes(), false);
            for (auto const& p : hosts_of_[l]) cut(p.mirror_offset, p.offset, p.source->size_bytes(), true);
        }
        first_piece_.back() = pieces.size();
        if (pieces.empty()) return;
        table_ = stream_memory(pieces.size() * sizeof(detail::piece), stream_->get());
        throw_if(::cudaMemcpyAsync(table_.data(), pieces.data(), pieces.size() * sizeof(detail::piece), cudaMemcpyDefault, stream_->get()),
                 "the snapshot's table");
        throw_if(::cudaStreamSynchronize(stream_->get()), "the snapshot's table");
    }

    /// Layers [first, last) in one launch.
    std::error_code gather(std::size_t first, std::size_t last, memory_of const& to) noexcept {
        auto const stream = stream_->get();
        if (detail::has_kernels()) {
            auto const begin = first_piece_[first], end = first_piece_[last];
            if (auto ec = code_of(detail::gather(reinterpret_cast<detail::piece const*>(table_.data()) + begin, end - begin, to.memory.data(),
                                                 to.mirror.data(), stream)))
                return ec;
        }
        for (auto l = first; l < last; ++l) {
            for (auto const& p : tensors_of_[l]) {
                if (detail::has_kernels() && varve::detail::is_contiguous(*p.source)) continue;
                if (auto ec = detail::enqueue(*p.source, 0, p.source->size_bytes(), to.memory.data() + p.offset, stream)) return ec;
            }
            if (detail::has_kernels()) continue;
            for (auto const& p : hosts_of_[l])
                if (auto ec = code_of(::cudaMemcpyAsync(to.memory.data() + p.offset, to.mirror.data() + p.mirror_offset, p.source->size_bytes(),
                                                        cudaMemcpyDefault, stream)))
                    return ec;
        }
        return {};
    }

    std::uint64_t const bytes_;
    int device_ = -1;
    std::optional<side_stream> stream_;
    std::shared_ptr<event_pool> taken_, hashed_;
    std::vector<std::vector<place>> tensors_of_, hosts_of_;  ///< by layer
    std::vector<std::size_t> first_piece_;                   ///< of a layer, in the table
    std::uint64_t mirror_bytes_ = 0;
    stream_memory table_;
    page_locked digests_;
    std::vector<memory_of> slots_;
    std::string why_;

    std::mutex mutex_;
    std::vector<std::size_t> free_;
};

}  // namespace varve::cuda
