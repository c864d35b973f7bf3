// expect: varve: a staging must have buffer_type acquire(std::stop_token)
#include "staging_archetype.hpp"

struct wrong : least_staging {
    buffer_type acquire() { return {}; }
};

static_assert(varve::explain_staging<wrong>());

int main() {}
