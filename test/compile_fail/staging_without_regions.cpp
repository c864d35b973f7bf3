// expect: varve: a staging must have regions(), a span of std::span<std::byte>
#include "staging_archetype.hpp"

struct wrong : least_staging {
    int regions() const { return 0; }
};

static_assert(varve::explain_staging<wrong>());

int main() {}
