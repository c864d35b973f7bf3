// expect: varve: a staging must have token_type copy(buffer_type&, std::span<varve::copy_range const>, point_type const&) noexcept
#include "staging_archetype.hpp"

struct wrong : least_staging {
    token_type copy(buffer_type&, std::span<varve::copy_range const>, point_type const&) { return {}; }
};

static_assert(varve::explain_staging<wrong>());

int main() {}
