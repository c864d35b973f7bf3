#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/sink.hpp"

namespace varve {

/// Keeps the image that was synced last in host memory, for tests and for measuring a save without a disk.
///
/// Copies share what they keep: hold one to look at what a checkpointer saved. At most one image is kept beside those
/// that are open and a spare one that the next `open` fills again. Thread-safe.
class memory_sink {
    struct shared {
        std::mutex mutex;
        std::shared_ptr<std::vector<std::byte>> newest, spare;
    };

public:
    class target_type {
    public:
        target_type(target_type&&) noexcept = default;
        target_type& operator=(target_type&&) noexcept = default;

        void write(std::uint64_t offset_bytes, block const& b, completion c) noexcept {
            c(b.size_bytes == 0 ? std::error_code{} : store(offset_bytes, b));
        }

        /// Fails with std::errc::invalid_argument when the range was never written.
        void read(std::uint64_t offset_bytes, std::span<std::byte> out, completion c) noexcept {
            bool inside = offset_bytes <= image_->size() && out.size() <= image_->size() - offset_bytes;
            if (inside && !out.empty()) std::memcpy(out.data(), image_->data() + offset_bytes, out.size());
            c(inside ? std::error_code{} : std::make_error_code(std::errc::invalid_argument));
        }

        /// Makes the image the newest one.
        std::error_code sync() noexcept {
            std::lock_guard lock(shared_->mutex);
            if (shared_->newest == image_) return {};
            shared_->spare = std::exchange(shared_->newest, image_);
            return {};
        }

    private:
        friend class memory_sink;
        target_type(std::shared_ptr<shared> s, std::shared_ptr<std::vector<std::byte>> image, bool grows)
            : shared_(std::move(s)), image_(std::move(image)), growth_(grows ? std::make_unique<std::mutex>() : nullptr) {}

        std::error_code store(std::uint64_t offset_bytes, block const& b) noexcept {
            std::unique_lock<std::mutex> lock;
            if (growth_) {
                lock = std::unique_lock(*growth_);
                try {
                    if (image_->size() < offset_bytes + b.size_bytes) image_->resize(offset_bytes + b.size_bytes);
                } catch (std::exception const&) {
                    return std::make_error_code(std::errc::not_enough_memory);
                }
            } else if (offset_bytes > image_->size() || b.size_bytes > image_->size() - offset_bytes) {
                return std::make_error_code(std::errc::invalid_argument);
            }
            std::memcpy(image_->data() + offset_bytes, b.data, b.size_bytes);
            return {};
        }

        std::shared_ptr<shared> shared_;
        std::shared_ptr<std::vector<std::byte>> image_;
        std::unique_ptr<std::mutex> growth_;  ///< of an image whose size is not known before
    };

    memory_sink() : shared_(std::make_shared<shared>()) {}

    /// Throws std::bad_alloc when there is no memory for the image.
    target_type open(open_request const& r) {
        std::shared_ptr<std::vector<std::byte>> image;
        {
            std::lock_guard lock(shared_->mutex);
            // Somebody may still look at it: then it is theirs.
            if (shared_->spare.use_count() == 1) image = std::move(shared_->spare);
        }
        if (!image) image = std::make_shared<std::vector<std::byte>>();
        image->resize(r.size_bytes);
        return {shared_, std::move(image), r.size_bytes == 0};
    }

    /// The image that was synced last; null before the first. It does not change while it is held.
    std::shared_ptr<std::vector<std::byte> const> newest() const {
        std::lock_guard lock(shared_->mutex);
        return shared_->newest;
    }

    sink_limits limits() const noexcept { return {}; }
    static constexpr bool accepts(memory_kind kind) noexcept { return kind != memory_kind::device; }
    std::string describe() const { return "memory: the newest image is kept"; }

private:
    std::shared_ptr<shared> shared_;
};

static_assert(sink<memory_sink> && reading_sink<memory_sink> && !file_sink<memory_sink>);

}  // namespace varve
