// compiles
//
// The control of async_needs_a_fixed_layout.cpp: with sync the same parts go together.
#include <varve/varve.hpp>

#include "streaming_archetype.hpp"

using right = varve::checkpointer<varve::host_staging, varve::sync, varve::null_sink, least_stream>;

void use(right& r) { r.save(1); }

int main() {}
