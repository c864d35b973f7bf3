#pragma once

#include <concepts>
#include <cstddef>
#include <memory>
#include <system_error>
#include <vector>

#include "varve/error.hpp"
#include "varve/torch/training_state.hpp"
#include "varve/torch/update.hpp"

namespace varve::libtorch {

/// Layers next to each other: [first, last).
struct layer_range {
    std::size_t first, last;
};

/// Carries out an optimizer's step, whole or for some layers, with the kernels that training_state_options names; what it
/// needs is listed once. All layers, however cut into ranges, yield the bits of the whole update.
///
/// It reads and writes the state that LibTorch's optimizer holds, so kinds may change from one run to the next. Parameters
/// that the fast kernels do not take (complex ones, say) are updated plainly, those without a gradient not at all. All
/// updates throw errc::state_changed where the optimizer has got other parameters or other state meanwhile.
class layerwise_updater {
public:
    struct lists;

    explicit layerwise_updater(std::unique_ptr<lists> l) noexcept;
    ~layerwise_updater();

    /// What runs: plain for SGD, whatever was asked for.
    update_kind kind() const noexcept;

    /// Updates the parameters of layer `index` alone; nothing where it has none. The optimizer's groups are whole again
    /// afterwards, also when it throws.
    void update(std::size_t index);
    void update(layer_range layers);
    /// What `optimizer.step()` does.
    void update_all();

    /// How a layerwise step cuts the layers: one at a time for plain, else into about training_state_options::update_groups
    /// ranges of similar size, since a kernel for many tensors pays with many of them.
    std::vector<layer_range> const& groups() const noexcept;

private:
    std::unique_ptr<lists> lists_;
};

/// Who is told about layers [first, last), as a checkpointer is.
template <class C>
concept layers_listener = requires(C& c, std::size_t first, std::size_t last) {
    c.before_update_of(first, last);
    c.layers_ready(first, last);
};
/// Who is told about layers, many at a time or one.
template <class C>
concept layer_listener = layers_listener<C> || requires(C& c, std::size_t layer) {
    c.before_update(layer);
    c.layer_ready(layer);
};

namespace detail {

template <layer_listener Listener>
void tell_before_update(Listener& listener, layer_range layers) {
    if constexpr (layers_listener<Listener>)
        listener.before_update_of(layers.first, layers.last);
    else
        for (auto l = layers.first; l < layers.last; ++l) listener.before_update(l);
}
template <layer_listener Listener>
void tell_ready(Listener& listener, layer_range layers) {
    if constexpr (layers_listener<Listener>)
        listener.layers_ready(layers.first, layers.last);
    else
        for (auto l = layers.first; l < layers.last; ++l) listener.layer_ready(l);
}

inline void expect_own(::torch::optim::Optimizer const& optimizer, training_state const& training, char const* call) {
    if (&optimizer != &training.optimizer())
        throw error(std::make_error_code(std::errc::invalid_argument), std::string(call) + ": the optimizer is not the one of the training state");
}

}  // namespace detail

/// Does what `optimizer.step()` does, with the kernels that the training state was made with. For steps without a save,
/// and for schedulings that take all layers at once:
///
///     ck.before_update();
///     varve::libtorch::whole_step(optimizer, training);
inline void whole_step(::torch::optim::Optimizer& optimizer, training_state& training) {
    detail::expect_own(optimizer, training, "whole_step");
    training.updater().update_all();
}

/// The same to the bit, a few layers at a time: before_update, the update, layer_ready. The layer `run` is waited for and
/// not announced: sealing takes it.
///
///     loss.backward();
///     ck.begin(step);  // on a step with a save due
///     varve::libtorch::layerwise_step(optimizer, training, ck);
///     ck.seal();
template <layer_listener Listener>
void layerwise_step(::torch::optim::Optimizer& optimizer, training_state& training, Listener& listener) {
    detail::expect_own(optimizer, training, "layerwise_step");
    for (auto const& group : training.updater().groups()) {
        detail::tell_before_update(listener, group);
        training.updater().update(group);
        detail::tell_ready(listener, group);
    }
    auto const run = training.state().layers.size() - 1;
    detail::tell_before_update(listener, {run, run + 1});
}

}  // namespace varve::libtorch
