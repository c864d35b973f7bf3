#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "varve/state.hpp"
#include "varve/torch/detail/python_layout.hpp"
#include "varve/torch/update.hpp"

// Declared here, so that who only passes a training_state on needs no LibTorch header.
namespace at {
class Tensor;
}
namespace torch::nn {
class Module;
}
namespace torch::optim {
class Optimizer;
}

namespace varve::libtorch {

class layerwise_updater;

struct training_state_options {
    bool rng = true;                          ///< whether LibTorch's default generators are: the CPU's, and those of the GPUs that the module is on
    update_kind update = update_kind::plain;  ///< how whole_step and layerwise_step update Adam and AdamW
    std::size_t update_groups = 2;            ///< into how many parts layerwise_step cuts an update that is not plain, about
};

/// The state of a module and its optimizer (Adam, AdamW or SGD) as named tensors in layers; the registration order of
/// the modules is the order of the layers, and the last layer is `run`.
///
/// Parameters and the optimizer's tensors are read and restored in place: only the update may change them, from
/// before_update on. What may change at any other moment (buffers, options, step counts, the generator's state, what the
/// user adds) is mirrored: state::refresh copies it when its layer is announced, and state::restored copies it back. What LibTorch's optimizers
/// create at their first update is created here, so a fresh optimizer can be restored into. Where a zero would change
/// the first update (SGD with momentum) `optimizer.<parameter>.momentum_buffer.set` (BOOL) says whether there is a
/// buffer yet; once there is, the optimizer uses the storage that the state has had from the start.
///
/// Module, optimizer and user variables outlive it. Not thread-safe: it belongs to the training thread.
///
///     varve::libtorch::training_state training(*model, optimizer);
///     training.add_user("epoch", epoch);  // before a checkpointer is built on it
///     varve::checkpointer ck(training.state(), ...);
class training_state {
public:
    /// Throws error with errc::unsupported for another optimizer, for an update that this LibTorch does not have, for tensors that no checkpoint can
    /// hold (sparse, quantized, a dtype without a name) and for parameters of the optimizer that the module does not have.
    training_state(::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer, training_state_options options = {});
    ~training_state();

    training_state(training_state const&) = delete;
    training_state& operator=(training_state const&) = delete;

    varve::state& state() noexcept { return state_; }
    varve::state const& state() const noexcept { return state_; }

    /// Adds `user.<name>` to the layer `run`. Throws std::errc::invalid_argument for a name that is there already.
    void add_user(std::string const& name, std::int64_t& value);
    void add_user(std::string const& name, double& value);
    /// The tensor may change at any time between saves, but not its address, shape or dtype.
    void add_user(std::string const& name, ::at::Tensor const& value);

    /// How Python's torch.optim and state_dict name the same state.
    detail::python_layout const& python() const noexcept;

    ::torch::optim::Optimizer& optimizer() const noexcept;
    /// What updates one layer after the other.
    layerwise_updater& updater() noexcept { return *updater_; }

private:
    struct parts;

    varve::state state_;
    std::unique_ptr<parts> parts_;
    std::unique_ptr<layerwise_updater> updater_;
};

}  // namespace varve::libtorch
