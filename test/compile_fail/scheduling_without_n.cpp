// expect: varve: a scheduling must have std::size_t max_in_flight() const
#include "varve/concepts/scheduling.hpp"

struct wrong {
    static constexpr varve::copy_moment copies = varve::copy_moment::at_seal;
    static constexpr varve::seal_wait waits = varve::seal_wait::nothing;
    static constexpr bool needs_fixed_layout = true;
};

static_assert(varve::explain_scheduling<wrong>());

int main() {}
