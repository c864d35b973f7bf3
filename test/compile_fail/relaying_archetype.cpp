// compiles
//
// The least relaying sink; with files of its own it is none.
#include "relaying_archetype.hpp"

struct with_files : relaying_archetype {
    static constexpr bool writes_files = true;
};
struct fetches : archetype_sink {
    std::optional<varve::fetched_checkpoint> fetch(std::optional<std::uint64_t>, std::uint32_t);
};

static_assert(varve::relaying_sink<relaying_archetype> && varve::explain_relaying_sink<relaying_archetype>());
static_assert(!varve::relaying_sink<with_files> && !varve::relaying_sink<archetype_sink>);
static_assert(varve::fetching_sink<fetches> && !varve::fetching_sink<relaying_archetype>);

int main() {}
