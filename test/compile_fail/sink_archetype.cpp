// compiles
//
// The least model is a sink, and has none of the optional powers.
#include "sink_archetype.hpp"

static_assert(varve::target<archetype_target>);
static_assert(varve::sink<archetype_sink>);
static_assert(varve::explain_sink<archetype_sink>());
static_assert(!varve::file_sink<archetype_sink> && !varve::registering_sink<archetype_sink>);
static_assert(!varve::reading_sink<archetype_sink> && !varve::device_sink<archetype_sink>);

int main() {}
