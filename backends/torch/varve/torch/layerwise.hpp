#pragma once

#include <concepts>
#include <cstddef>
#include <memory>
#include <system_error>

#include "varve/error.hpp"
#include "varve/torch/training_state.hpp"

namespace varve::libtorch {

/// Carries out an optimizer's step one layer at a time: the parameters of each layer, by group, are listed once, and an
/// update swaps them in for the optimizer's own lists. All layers in order yield the bits of one step().
class layerwise_updater {
public:
    struct lists;

    explicit layerwise_updater(std::unique_ptr<lists> l) noexcept;
    ~layerwise_updater();

    /// Updates the parameters of layer `index` alone; nothing where it has none. The groups are whole again afterwards,
    /// also when step() throws. Throws errc::state_changed where the optimizer has got other parameters meanwhile.
    void update(std::size_t index);

private:
    std::unique_ptr<lists> lists_;
};

/// Who is told about layers, as a checkpointer is.
template <class C>
concept layer_listener = requires(C& c, std::size_t layer) {
    c.before_update(layer);
    c.layer_ready(layer);
};

/// Does what `optimizer.step()` does, to the bit, layer by layer: before_update, the update, layer_ready. The layer `run`
/// is waited for and not announced: sealing takes it.
///
///     loss.backward();
///     ck.begin(step);  // on a step with a save due
///     varve::libtorch::layerwise_step(optimizer, training, ck);
///     ck.seal();
template <layer_listener Listener>
void layerwise_step(::torch::optim::Optimizer& optimizer, training_state& training, Listener& listener) {
    if (&optimizer != &training.optimizer())
        throw error(std::make_error_code(std::errc::invalid_argument), "layerwise_step: the optimizer is not the one of the training state");
    auto const run = training.state().layers.size() - 1;
    for (std::size_t l = 0; l < run; ++l) {
        listener.before_update(l);
        training.updater().update(l);
        listener.layer_ready(l);
    }
    listener.before_update(run);
}

}  // namespace varve::libtorch
