#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "varve/state.hpp"

#include "methods.hpp"
#include "settings.hpp"

namespace varve::tool {

/// The guide's transformer with Adam on synthetic data, behind an interface that needs no LibTorch header.
///
/// The batch of step k is a pure function of (seed, k), counted from 1; dropout draws on LibTorch's default generators, whose
/// state is part of the training state. So a fresh trainer that restores step k computes step k + 1 as the first one did.
class trainer {
public:
    virtual ~trainer() = default;

    /// Forward and backward pass of step k; returns the loss. On a GPU the backward pass may still run.
    virtual float forward_backward(std::uint64_t step) = 0;
    /// The whole update of that step.
    virtual void update() = 0;
    /// The same update layer by layer, each announced to the method; the same bits.
    virtual void update_by_layer(running_method& method) = 0;
    /// "plain", "foreach" or "fused": with another one the same run has other bits.
    virtual std::string update_kernels() const = 0;
    /// Waits until the device has done everything, a method's copies too.
    virtual void synchronize() = 0;
    /// Waits for the steps alone.
    virtual void wait_for_steps() = 0;
    /// The most that tensors have taken of the GPU's memory so far; 0 on a CPU.
    virtual std::uint64_t peak_device_bytes() const = 0;

    /// What a method checkpoints.
    virtual libtorch::training_state& training() = 0;
    /// The same as named tensors.
    virtual varve::state& tensors() = 0;

    /// Throws varve::error(errc::mismatch), naming the setting, where the restored run was trained with other settings that
    /// no tensor's shape shows (seed, batch size, dropout, ...), or its data position does not fit `step`.
    virtual void expect_same_run(std::uint64_t step) const = 0;
};

/// Throws usage_error, which says what is missing, in a build without LibTorch.
void require_trainer();

/// Throws varve::error where the model does not fit into memory.
std::unique_ptr<trainer> make_trainer(settings const& s);

/// "cuda" or "cpu": what --device comes to here. Throws usage_error for cuda where the build or the machine has none.
std::string chosen_device(settings const& s);

/// "plain", "foreach" or "fused": what --update comes to here. Throws usage_error for what this LibTorch does not have.
std::string chosen_update(settings const& s);

/// What a result says about the library that computes.
struct trainer_facts {
    std::string torch_version;
    int threads = 0;
};
trainer_facts facts_of_trainer();

/// Name and digest of every tensor: two runs with the same list have the same bits in every tensor.
std::vector<std::pair<std::string, std::string>> fingerprint(varve::state& s);

}  // namespace varve::tool
