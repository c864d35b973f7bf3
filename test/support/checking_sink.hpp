#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <varve/format/safetensors.hpp>
#include <varve/sink/memory.hpp>
#include <varve/state.hpp>

#include "gate.hpp"

namespace varve_test {

/// What a checking_sink has seen, and how long it takes.
struct checked_images {
    std::chrono::milliseconds delay{0};  ///< of each write
    gate door;                           ///< before each write
    std::atomic<std::size_t> writes{0};
    std::mutex mutex;
    std::vector<int> steps;
};

/// Keeps, of every image that was synced, the step that all of its bytes say; -1 where they do not agree. `Fetch()(to, block)` gets
/// a block's bytes to the host where they are in GPU memory.
template <class Fetch>
class checking_sink_by {
public:
    using log = checked_images;

    checking_sink_by(varve::state const& s, std::shared_ptr<log> l)
        : data_offset_(varve::safetensors{}.lay_out(s).header_bytes), log_(std::move(l)) {}

    class target_type {
    public:
        target_type(varve::memory_sink memory, std::uint64_t data_offset, std::shared_ptr<log> l, varve::open_request const& r)
            : memory_(std::move(memory)), image_(memory_.open(r)), data_offset_(data_offset), log_(std::move(l)) {}
        target_type(target_type&&) = default;
        target_type& operator=(target_type&&) = default;

        void write(std::uint64_t offset_bytes, varve::block const& b, varve::completion c) noexcept {
            log_->door.pass();
            std::this_thread::sleep_for(log_->delay);
            ++log_->writes;
            if (b.memory != varve::memory_kind::device) return image_.write(offset_bytes, b, c);
            std::vector<std::byte> fetched(b.size_bytes);
            if (auto failed = Fetch()(fetched.data(), b)) return c(failed);
            image_.write(offset_bytes, {fetched.data(), fetched.size()}, c);
        }
        std::error_code sync() noexcept {
            if (auto ec = image_.sync()) return ec;
            auto bytes = memory_.newest();
            auto const* first = bytes->data() + data_offset_;
            auto size = bytes->size() - data_offset_;
            bool whole = std::memcmp(first, first + 1, size - 1) == 0;
            std::lock_guard lock(log_->mutex);
            log_->steps.push_back(whole ? std::to_integer<int>(*first) : -1);
            return {};
        }

    private:
        varve::memory_sink memory_;
        varve::memory_sink::target_type image_;
        std::uint64_t data_offset_;
        std::shared_ptr<log> log_;
    };

    target_type open(varve::open_request const& r) { return {varve::memory_sink{}, data_offset_, log_, r}; }
    varve::sink_limits limits() const { return {}; }
    static constexpr bool accepts(varve::memory_kind) noexcept { return true; }
    std::string describe() const { return "checks what it is given"; }

private:
    std::uint64_t data_offset_;
    std::shared_ptr<log> log_;
};

}  // namespace varve_test
