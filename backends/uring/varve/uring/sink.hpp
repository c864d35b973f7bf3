#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "varve/concepts/sink.hpp"
#include "varve/detail/file_target.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/direct_io.hpp"
#include "varve/system.hpp"
#include "varve/uring/ring.hpp"

namespace varve::uring {

using varve::direct_io;

struct sink_options {
    unsigned queue_depth = 8;  ///< pieces in flight, of all targets together
    direct_io direct = direct_io::automatic;
    std::size_t block_bytes = 8u << 20;  ///< what limits() calls best
    std::size_t piece_bytes = 8u << 20;  ///< what one entry of the ring carries; a multiple of 4,096
    system_calls* calls = &system_calls::kernel();
};

/// Writes files through one io_uring, which all targets share and one thread serves.
///
/// Blocks are direct where address, offset and length allow it, and buffered otherwise; an image's tail that is shorter
/// than the alignment always is. Memory that was registered is not pinned again for every write. Completions run on the
/// ring's thread. Thread-safe but for moving and register_memory. Source: io_uring(7), open(2) "O_DIRECT".
///
///     if (!varve::uring::sink::available()) {
///         varve::uring::sink files({.queue_depth = 16});
///         auto target = files.open({folder, "image", size_bytes});
///     }
class sink {
public:
    using target_type = detail::file_target<ring>;
    static constexpr bool writes_files = true;

    /// Throws error: errc::unsupported where the kernel refuses io_uring, else the system's code.
    explicit sink(sink_options const& options = {})
        : options_(options),
          ring_(std::make_unique<ring>(options.queue_depth, options.piece_bytes, options.direct == direct_io::automatic, *options.calls)) {}

    /// Whether the kernel gives a ring: nothing, or why not (std::errc::operation_not_permitted, function_not_supported, ...).
    static std::error_code available() noexcept { return ring::available(); }

    /// Takes a region for itself, for as long as the sink lives; the caller keeps it mapped that long. Called before the
    /// first write. Returns the slot for blocks of the region, or `unregistered`: describe() then names the limit to raise.
    int register_memory(std::span<std::byte> region) { return ring_->memory().add(region); }

    /// Throws error with the system's code when the file cannot be opened or sized.
    target_type open(open_request const& r) { return {detail::open_file(r, ring_->mode, *options_.calls), *ring_}; }

    sink_limits limits() const noexcept {
        auto alignment = options_.direct == direct_io::automatic ? detail::direct_alignment : 1;
        return {alignment, alignment, alignment, options_.block_bytes, ring_->queue_depth()};
    }

    static constexpr bool accepts(memory_kind kind) noexcept { return kind != memory_kind::device; }

    std::string describe() const {
        return "io_uring, queue depth " + std::to_string(ring_->queue_depth()) + ", " + ring_->mode.describe() + ", " + ring_->memory().describe();
    }

private:
    sink_options options_;
    std::unique_ptr<ring> ring_;
};

static_assert(varve::sink<sink> && file_sink<sink> && reading_sink<sink> && registering_sink<sink>);

}  // namespace varve::uring
