// compiles
//
// Each optional power is one member more, and a wrong one is none.
#include <span>

#include "sink_archetype.hpp"

struct files : archetype_sink {
    static constexpr bool writes_files = true;
};
struct no_files : archetype_sink {
    static constexpr bool writes_files = false;
};
struct registers : archetype_sink {
    int register_memory(std::span<std::byte>);
};
struct registers_wrongly : archetype_sink {
    void register_memory(std::span<std::byte>);
};
struct takes_device_memory : archetype_sink {
    static constexpr bool accepts(varve::memory_kind kind) { return kind == varve::memory_kind::device; }
};
struct reading_target : archetype_target {
    void read(std::uint64_t, std::span<std::byte>, varve::completion) noexcept;
};
struct reads : archetype_sink {
    using target_type = reading_target;
    target_type open(varve::open_request const&);
};

static_assert(varve::file_sink<files> && !varve::file_sink<no_files>);
static_assert(varve::registering_sink<registers> && !varve::registering_sink<registers_wrongly>);
static_assert(varve::device_sink<takes_device_memory>);
static_assert(varve::reading_sink<reads>);

int main() {}
