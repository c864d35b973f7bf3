// expect: varve: a staging must have static constexpr varve::memory_kind memory
#include "staging_archetype.hpp"

struct wrong : least_staging {
    int memory = 0;
};

static_assert(varve::explain_staging<wrong>());

int main() {}
