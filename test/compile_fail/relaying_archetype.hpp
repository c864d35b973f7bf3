#pragma once

#include "sink_archetype.hpp"

#include <varve/concepts/relaying_sink.hpp>

/// The least that satisfies `relaying_sink`.
struct relaying_target : archetype_target {
    using archetype_target::write;
    void write(std::uint64_t, varve::block const&, varve::completion, varve::loan) noexcept;
    void hand_over(varve::commit_values const&, std::span<std::uint64_t const>, varve::completion, varve::completion) noexcept;
};

struct relaying_archetype : archetype_sink {
    using target_type = relaying_target;
    target_type open(varve::open_request const&);
    void introduce(varve::relayed_run const&);
    bool takes_digests() const noexcept;
};
