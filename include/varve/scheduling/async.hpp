#pragma once

#include "varve/concepts/scheduling.hpp"

namespace varve {

/// The state is copied from seal on while training goes on, with up to N saves in flight; before_update waits for the
/// copies of the tensors that it is about to change. `async<dynamic>(n)` takes N at run time.
/// Source: F. Strati, M. Friedman, A. Klimovic, "PCcheck: Persistent Concurrent Checkpointing for ML", ASPLOS 2025.
template <std::size_t N = dynamic>
struct async : detail::in_flight_limit<N> {
    using detail::in_flight_limit<N>::in_flight_limit;
    static constexpr copy_moment copies = copy_moment::at_seal;
    static constexpr seal_wait waits = seal_wait::nothing;
    static constexpr bool needs_fixed_layout = true;
};

static_assert(scheduling<async<2>> && scheduling<async<dynamic>>);

}  // namespace varve
