#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include <varve/image.hpp>
#include <varve/store.hpp>
#include <varve/ticket.hpp>

#include "plain_sinks.hpp"

/// A run of the toy model, as the tests of the checkpointer take it.
namespace varve_test {

inline constexpr std::size_t block = varve::block_unit_bytes;
inline constexpr std::size_t floats_per_block = block / sizeof(float);

/// A store whose files are not allocated ahead, which a small test would wait for.
inline varve::store_options quick_store(std::size_t keep = 2) {
    varve::store_options o;
    o.keep = keep;
    o.prepare = varve::prepare_mode::none;
    return o;
}

/// One step, layer by layer; the ticket of one that is not saved never ends.
template <class Checkpointer>
varve::ticket train_step(Checkpointer& ck, toy_model& model, std::uint64_t step, bool save = true) {
    if (save) ck.begin(step);
    for (std::size_t l = 0; l < model.state().layers.size(); ++l) {
        ck.before_update(l);
        model.update(l, step);
        ck.layer_ready(l);
    }
    return save ? ck.seal() : varve::ticket(std::make_shared<varve::detail::ticket_state>(step));
}

}  // namespace varve_test
