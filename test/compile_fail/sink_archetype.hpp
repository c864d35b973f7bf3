#pragma once

#include <cstdint>
#include <string>
#include <system_error>
#include <varve/concepts/sink.hpp>

/// The least that satisfies `sink`: nothing may be taken away. The wrong models beside it are this with one fault each.
struct archetype_target {
    archetype_target(archetype_target&&) noexcept;
    archetype_target& operator=(archetype_target&&) noexcept;
    void write(std::uint64_t, varve::block const&, varve::completion) noexcept;
    std::error_code sync() noexcept;
};

struct archetype_sink {
    using target_type = archetype_target;
    archetype_sink(archetype_sink&&) noexcept;
    archetype_sink& operator=(archetype_sink&&) noexcept;
    target_type open(varve::open_request const&);
    varve::sink_limits limits() const;
    static constexpr bool accepts(varve::memory_kind) { return false; }
    std::string describe() const;
};
