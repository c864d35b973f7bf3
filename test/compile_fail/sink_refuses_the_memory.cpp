// expect: varve: this sink does not take memory of this staging's kind
#include <varve/varve.hpp>

/// Takes GPU memory and nothing else.
struct device_only : varve::null_sink {
    static constexpr bool accepts(varve::memory_kind kind) { return kind == varve::memory_kind::device; }
};

using wrong = varve::checkpointer<varve::host_staging, varve::sync, device_only>;

void use(wrong& w) { w.save(1); }

int main() {}
