// expect: varve: a sink must have std::string describe() const
//
// Results are keyed by how it wrote.
#include "sink_archetype.hpp"

struct wrong : archetype_sink {
    char const* describe() const;
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
