#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "varve/concepts/sink.hpp"
#include "varve/detail/file_target.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/direct_io.hpp"
#include "varve/posix/writer_pool.hpp"
#include "varve/system.hpp"

namespace varve::posix {

using varve::direct_io;

struct sink_options {
    unsigned writer_threads = 4;
    direct_io direct = direct_io::automatic;
    std::size_t block_bytes = 8u << 20;   ///< what limits() calls best
    std::size_t stripe_bytes = 1u << 20;  ///< the least that is worth a thread of its own; a multiple of 4,096
    system_calls* calls = &system_calls::kernel();
};

/// Writes files with pwrite from a few threads, which all targets share; a block is split among them.
///
/// Blocks are direct where address, offset and length allow it, and buffered otherwise; an image's tail that is shorter
/// than the alignment always is. Completions run on the sink's threads; a small buffered write ends inside `write`.
/// Thread-safe but for moving. Source: pwrite(2), open(2) "O_DIRECT".
///
///     varve::posix::sink files({.writer_threads = 4});
///     auto target = files.open({folder, "image", size_bytes});
class sink {
public:
    using target_type = detail::file_target<writer_pool>;
    static constexpr bool writes_files = true;

    /// Throws std::system_error when a thread cannot be started.
    explicit sink(sink_options const& options = {})
        : options_(options),
          pool_(std::make_unique<writer_pool>(options.writer_threads, options.stripe_bytes, options.direct == direct_io::automatic, *options.calls)) {
    }

    /// Throws error with the system's code when the file cannot be opened or sized.
    target_type open(open_request const& r) { return {detail::open_file(r, pool_->mode, *options_.calls), *pool_}; }

    sink_limits limits() const noexcept {
        auto alignment = options_.direct == direct_io::automatic ? detail::direct_alignment : 1;
        return {alignment, alignment, alignment, options_.block_bytes, pool_->threads()};
    }

    static constexpr bool accepts(memory_kind kind) noexcept { return kind != memory_kind::device; }

    std::string describe() const { return "posix, " + std::to_string(pool_->threads()) + " threads, " + pool_->mode.describe(); }

private:
    sink_options options_;
    std::unique_ptr<writer_pool> pool_;
};

static_assert(varve::sink<sink> && file_sink<sink> && reading_sink<sink>);

}  // namespace varve::posix
