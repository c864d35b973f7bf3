// What a project does that embeds the core alone: save a state, and look at what came out.
#include <varve/varve.hpp>

#include <cstdio>
#include <vector>

int main() {
    std::vector<float> weights(1000, 1.5f);
    varve::state state;
    state.layers.push_back({"linear", {{"linear.weight", varve::dtype::F32, {10, 100}, weights.data(), {}, varve::memory_kind::host}}});

    varve::memory_sink sink;
    varve::checkpointer ck(state, varve::host_staging(varve::block_unit_bytes, varve::block_unit_bytes), varve::sync{}, sink);
    ck.save(1).durable().get();
    std::puts("core");
}
