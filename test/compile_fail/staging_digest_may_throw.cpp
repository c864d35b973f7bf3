// expect: digesting_staging
#include "staging_archetype.hpp"

struct wrong : least_staging {
    std::error_code digest(buffer_type const&, std::size_t, std::span<std::uint64_t>) { return {}; }
};

static_assert(varve::digesting_staging<wrong>);

int main() {}
