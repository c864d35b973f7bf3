// expect: varve: this scheduling needs a format with a fixed layout; use varve::sync, or another format
#include <varve/varve.hpp>

#include "streaming_archetype.hpp"

using wrong = varve::checkpointer<varve::host_staging, varve::async<2>, varve::null_sink, least_stream>;

void use(wrong& w) { w.save(1); }

int main() {}
