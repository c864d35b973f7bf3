#pragma once

#include "varve/concepts/scheduling.hpp"

namespace varve {

/// The save returns when it is durable: training waits for all of it.
struct sync {
    static constexpr copy_moment copies = copy_moment::at_seal;
    static constexpr seal_wait waits = seal_wait::durable;
    static constexpr bool needs_fixed_layout = false;
    constexpr std::size_t max_in_flight() const noexcept { return 1; }
};

static_assert(scheduling<sync>);

}  // namespace varve
