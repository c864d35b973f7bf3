// expect: varve: a target must be move-only
//
// A target that can be copied would close its file twice.
#include "sink_archetype.hpp"

struct wrong_target {
    void write(std::uint64_t, varve::block const&, varve::completion) noexcept;
    std::error_code sync() noexcept;
};

struct wrong : archetype_sink {
    using target_type = wrong_target;
    target_type open(varve::open_request const&);
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
