#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/cuda/detail/digest.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/digest.hpp"

namespace varve::gds::detail {

/// Hashes buffers in GPU memory, for several threads side by side, each in a stream of its own. Thread-safe.
class digests {
public:
    /// For the calling thread's device, and buffers of up to `buffer_bytes`. Throws error.
    digests(std::size_t buffer_bytes, std::shared_ptr<cuda::event_pool> events)
        : most_chunks_(varve::detail::chunk_count(buffer_bytes)), events_(std::move(events)) {
        give_back(std::make_unique<lane>(most_chunks_));
    }

    /// Puts the digest of each chunk of the bytes to the front of `out`; they are there when it returns. On a thread that is
    /// on the buffers' device.
    std::error_code hash(std::byte const* data, std::size_t size_bytes, std::span<std::uint64_t> out) noexcept {
        try {
            auto mine = take();
            auto* found = reinterpret_cast<std::uint64_t*>(mine->found.data());
            auto failed = cuda::code_of(cuda::detail::chunk_digests(data, size_bytes, found, mine->stream.get()));
            failed = events_->mark(mine->stream.get(), failed).wait();
            if (!failed) std::memcpy(out.data(), found, varve::detail::chunk_count(size_bytes) * sizeof(std::uint64_t));
            give_back(std::move(mine));
            return failed;
        } catch (error const& e) {
            return e.code();
        } catch (std::bad_alloc const&) {
            return std::make_error_code(std::errc::not_enough_memory);
        }
    }

private:
    struct lane {
        explicit lane(std::size_t chunks) : found(chunks * sizeof(std::uint64_t)) {}
        cuda::side_stream stream{true};
        cuda::page_locked found;
    };

    std::unique_ptr<lane> take() {
        {
            std::lock_guard lock(mutex_);
            if (!free_.empty()) {
                auto l = std::move(free_.back());
                free_.pop_back();
                return l;
            }
        }
        return std::make_unique<lane>(most_chunks_);
    }
    void give_back(std::unique_ptr<lane> l) {
        std::lock_guard lock(mutex_);
        free_.push_back(std::move(l));
    }

    std::size_t const most_chunks_;
    std::shared_ptr<cuda::event_pool> events_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<lane>> free_;
};

}  // namespace varve::gds::detail
