// expect: varve: a sink must have target_type open(varve::open_request const&)
//
// What open yields is the target_type itself.
#include "sink_archetype.hpp"

struct wrong : archetype_sink {
    int open(varve::open_request const&);
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
