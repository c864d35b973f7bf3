// expect: varve: a sink must name its target_type
//
// The checkpointer keeps targets: it must know their type.
#include <string>
#include <varve/concepts/sink.hpp>

struct wrong {
    varve::sink_limits limits() const;
    static constexpr bool accepts(varve::memory_kind) { return true; }
    std::string describe() const;
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
