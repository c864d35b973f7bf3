// expect: varve: a sink must have varve::sink_limits limits() const
//
// Alignments and the best block size are published.
#include "sink_archetype.hpp"

struct wrong : archetype_sink {
    varve::sink_limits limits() const = delete;
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
