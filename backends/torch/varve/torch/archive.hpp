#pragma once

#include <memory>
#include <utility>

#include "varve/concepts/format.hpp"
#include "varve/torch/archive_reader.hpp"
#include "varve/torch/training_state.hpp"

namespace varve::libtorch {

/// Checkpoints as the archives that Python's torch.save writes: `{"model": state_dict, "optimizer": {"state", "param_groups"},
/// "rng": {"cpu", "cuda.0", ...}, "step", "user"}`. torch.load(weights_only=True) opens them, and the model and optimizer of a Python trainer
/// take `model` and `optimizer` by load_state_dict. Source: varve/format/README.md, "Torch archive".
///
/// Beside those stand the records `varve/step`, `varve/sequence`, `varve/metadata`, `varve/tensors` (where each of the state's
/// tensors is) and `varve/digest`. The training state outlives it.
///
///     varve::libtorch::archive format(training);
///     format.stream(training.state(), {step, sequence, metadata}, out);
class archive final : public archive_reader {
public:
    /// `device` is the way to tensors in GPU memory, for writing.
    explicit archive(training_state const& training, std::shared_ptr<device_memory> device = nullptr) noexcept
        : training_(&training), device_(std::move(device)) {}

    /// Writes the whole file, in order. `s` is the training state's. Throws, before the first byte, errc::unsupported for tensors in
    /// GPU memory without a way there, and std::errc::invalid_argument for metadata keys that begin with `varve.`, for what is not
    /// UTF-8, and for metadata, or tensors' names and shapes, of more than 16 MiB, which no reader would take.
    void stream(state const& s, commit_values const& values, byte_stream& out) const;

private:
    training_state const* training_;
    std::shared_ptr<device_memory> device_;
};

static_assert(streaming_format<archive>);
static_assert(format<archive>);

}  // namespace varve::libtorch
