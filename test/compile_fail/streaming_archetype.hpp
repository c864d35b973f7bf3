#pragma once

#include <varve/concepts/format.hpp>

/// The least format that streams.
struct least_stream : varve::file_format {
    std::string_view extension() const noexcept override { return ".least"; }
    varve::checkpoint_identity identify(int) const override { return {}; }
    void verify(int, unsigned) const override {}
    void expect_same_layout(int, varve::state const&) const override {}
    varve::checkpoint_identity restore(int, varve::state&, varve::restore_options const&) const override { return {}; }
    void stream(varve::state const&, varve::commit_values const&, varve::byte_stream&) const {}
};

static_assert(varve::streaming_format<least_stream> && varve::format<least_stream>);
