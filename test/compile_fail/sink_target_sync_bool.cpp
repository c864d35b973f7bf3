// expect: varve: a target must have std::error_code sync() noexcept
//
// A sync says why it failed.
#include "sink_archetype.hpp"

struct wrong_target {
    wrong_target(wrong_target&&) noexcept;
    wrong_target& operator=(wrong_target&&) noexcept;
    void write(std::uint64_t, varve::block const&, varve::completion) noexcept;
    bool sync() noexcept;
};

struct wrong : archetype_sink {
    using target_type = wrong_target;
    target_type open(varve::open_request const&);
};

static_assert(!varve::sink<wrong>);
static_assert(varve::explain_sink<wrong>());

int main() {}
