// expect: varve: a buffer must be move-only
#include "staging_archetype.hpp"

struct wrong : least_staging {
    struct buffer_type {
        std::byte* data() const { return nullptr; }
        std::size_t region() const { return 0; }
        explicit operator bool() const { return false; }
    };
    buffer_type acquire(std::stop_token) { return {}; }
    token_type copy(buffer_type&, std::span<varve::copy_range const>, point_type const&) noexcept { return {}; }
};

static_assert(varve::explain_staging<wrong>());

int main() {}
