// expect: varve: a sink must have static constexpr bool accepts(varve::memory_kind)
//
// Whether a staging fits is known at compile time.
#include "sink_archetype.hpp"

struct wrong : archetype_sink {
    bool accepts(varve::memory_kind) const;
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
