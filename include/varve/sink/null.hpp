#pragma once

#include <cstdint>
#include <string>
#include <system_error>

#include "varve/concepts/sink.hpp"

namespace varve {

/// Takes every block at once and keeps nothing: what is left of a save's cost is everything but the writing.
/// Thread-safe.
class null_sink {
public:
    class target_type {
    public:
        target_type() = default;
        target_type(target_type&&) noexcept = default;
        target_type& operator=(target_type&&) noexcept = default;

        void write(std::uint64_t, block const&, completion c) noexcept { c({}); }
        std::error_code sync() noexcept { return {}; }
    };

    target_type open(open_request const&) { return {}; }
    sink_limits limits() const noexcept { return {}; }
    static constexpr bool accepts(memory_kind) noexcept { return true; }
    std::string describe() const { return "null: nothing is written"; }
};

static_assert(sink<null_sink> && device_sink<null_sink> && !file_sink<null_sink>);

}  // namespace varve
