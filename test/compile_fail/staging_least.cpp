// compiles
//
// The archetype satisfies the concept, and nothing that it leaves out is asked for.
#include "staging_archetype.hpp"

static_assert(varve::staging<least_staging>);
static_assert(varve::explain_staging<least_staging>());

int main() {}
