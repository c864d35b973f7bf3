// expect: varve: a staging in GPU memory must hash its buffers itself
#include <varve/varve.hpp>

#include "staging_archetype.hpp"

struct wrong : least_staging {
    static constexpr varve::memory_kind memory = varve::memory_kind::device;
};

using never = varve::checkpointer<wrong, varve::sync, varve::null_sink>;

void use(never& n) { n.save(1); }

int main() {}
