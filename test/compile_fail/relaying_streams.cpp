// expect: varve: a relaying sink needs a format with a fixed layout
//
// A monitor knows a checkpoint's layout before its first block.
#include "relaying_archetype.hpp"
#include "streaming_archetype.hpp"

#include <varve/checkpointer.hpp>
#include <varve/scheduling/sync.hpp>
#include <varve/staging/host.hpp>

struct takes_all : relaying_archetype {
    static constexpr bool accepts(varve::memory_kind) { return true; }
};

template class varve::checkpointer<varve::host_staging, varve::sync, takes_all, least_stream>;

int main() {}
