#pragma once

#include "varve/concepts/scheduling.hpp"

namespace varve {

/// A layer is copied as soon as its own update is done, while the others are still being updated and the next forward
/// pass runs; full blocks go to the sink meanwhile. `layerwise<dynamic>(n)` takes N, the saves in flight, at run time.
template <std::size_t N = dynamic>
struct layerwise : detail::in_flight_limit<N> {
    using detail::in_flight_limit<N>::in_flight_limit;
    static constexpr copy_moment copies = copy_moment::at_layer_ready;
    static constexpr seal_wait waits = seal_wait::nothing;
    static constexpr bool needs_fixed_layout = true;
};

static_assert(scheduling<layerwise<2>> && scheduling<layerwise<dynamic>>);

}  // namespace varve
