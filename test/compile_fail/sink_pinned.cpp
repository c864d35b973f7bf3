// expect: varve: a sink must be movable
//
// A sink that cannot be moved cannot be given to a checkpointer.
#include "sink_archetype.hpp"

struct wrong : archetype_sink {
    wrong(wrong&&) = delete;
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
