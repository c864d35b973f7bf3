// expect: varve: a staging must have point_type record(order_type) noexcept
#include "staging_archetype.hpp"

struct wrong : least_staging {
    point_type record(order_type) { return {}; }
};

static_assert(varve::explain_staging<wrong>());

int main() {}
