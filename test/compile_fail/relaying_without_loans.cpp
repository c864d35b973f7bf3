// expect: varve: a relaying sink's target must have void write(
//
// What the receiver reads later must not be overwritten meanwhile.
#include "relaying_archetype.hpp"

struct wrong_target : archetype_target {
    void hand_over(varve::commit_values const&, std::span<std::uint64_t const>, varve::completion, varve::completion) noexcept;
};
struct wrong : relaying_archetype {
    using target_type = wrong_target;
    target_type open(varve::open_request const&);
};

static_assert(!varve::relaying_sink<wrong>);
static_assert(varve::explain_relaying_sink<wrong>());

int main() {}
