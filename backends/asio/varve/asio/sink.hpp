#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <system_error>

#include <boost/asio/io_context.hpp>

#include "varve/asio/context_thread.hpp"
#include "varve/asio/file_lanes.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/detail/file_target.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/direct_io.hpp"
#include "varve/system.hpp"

namespace varve::asio {

using varve::direct_io;

struct sink_options {
    unsigned queue_depth = 8;  ///< pieces in flight, of all targets together
    direct_io direct = direct_io::automatic;
    std::size_t block_bytes = 8u << 20;          ///< what limits() calls best
    std::size_t piece_bytes = 8u << 20;          ///< what one operation of Asio carries; a multiple of 4,096
    boost::asio::io_context* context = nullptr;  ///< the caller's; null: one of the sink's own, with a thread of its own
    system_calls* calls = &system_calls::kernel();
};

/// Writes files through Boost.Asio's random_access_file, on the caller's io_context or on one of its own.
///
/// Blocks are direct where address, offset and length allow it, and buffered otherwise; an image's tail that is shorter
/// than the alignment always is. Completions run where the context runs. A caller's context outlives the sink, and the
/// caller runs it, on one thread or several, for as long as writes are to be answered (run() returns when nothing is left
/// to do: keep a work guard); a thread that runs it must not wait for a write. Thread-safe but for moving.
/// Source: Boost.Asio, "Files"; open(2) "O_DIRECT".
///
///     if (!varve::asio::sink::available()) {
///         boost::asio::io_context context;
///         varve::asio::sink files({.context = &context});
///         auto target = files.open({folder, "image", size_bytes});
///     }
class sink {
public:
    using target_type = varve::detail::file_target<file_lanes>;
    static constexpr bool writes_files = true;

    /// Throws error: errc::unsupported where the kernel refuses io_uring, else the system's code.
    explicit sink(sink_options const& options = {}) : options_(options), engine_(std::make_unique<engine>(options)) {}

    /// Whether Asio can have files here: nothing, or why not (std::errc::operation_not_permitted, function_not_supported, ...).
    static std::error_code available() noexcept { return file_lanes::available(); }

    /// Throws error with the system's code when the file cannot be opened or sized.
    target_type open(open_request const& r) { return {varve::detail::open_file(r, engine_->lanes->mode, *options_.calls), *engine_->lanes}; }

    sink_limits limits() const noexcept {
        auto alignment = options_.direct == direct_io::automatic ? varve::detail::direct_alignment : 1;
        return {alignment, alignment, alignment, options_.block_bytes, engine_->lanes->count()};
    }

    static constexpr bool accepts(memory_kind kind) noexcept { return kind != memory_kind::device; }

    std::string describe() const {
        return "Boost.Asio, queue depth " + std::to_string(engine_->lanes->count()) + ", " + engine_->lanes->mode.describe() +
               (options_.context ? ", on the caller's io_context" : "");
    }

private:
    /// The lanes go before the context that they are on.
    struct engine {
        explicit engine(sink_options const& o)
            : own(o.context ? nullptr : std::make_unique<context_thread>()),
              lanes(std::make_shared<file_lanes>(o.context ? *o.context : own->get(), o.queue_depth, o.piece_bytes, o.direct == direct_io::automatic,
                                                 *o.calls)) {}

        std::unique_ptr<context_thread> own;
        std::shared_ptr<file_lanes> lanes;
    };

    sink_options options_;
    std::unique_ptr<engine> engine_;
};

static_assert(varve::sink<sink> && file_sink<sink> && reading_sink<sink>);

}  // namespace varve::asio
