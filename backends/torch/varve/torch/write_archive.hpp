#pragma once

#include "varve/concepts/format.hpp"
#include "varve/torch/detail/python_layout.hpp"

namespace varve::libtorch {

/// Writes a torch archive of any state whose tensors `layout` names as Python does; the last layer is `run`. `device` is
/// the way to tensors in GPU memory. For what has no module: varve::libtorch::archive does the same for a training state. Throws as archive::stream.
void write_archive(state const& s, detail::python_layout const& layout, commit_values const& values, byte_stream& out,
                   device_memory* device = nullptr);

}  // namespace varve::libtorch
