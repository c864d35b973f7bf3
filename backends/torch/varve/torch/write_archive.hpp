#pragma once

#include "varve/concepts/format.hpp"
#include "varve/torch/detail/python_layout.hpp"

namespace varve::libtorch {

/// Writes a torch archive of any state in host memory whose tensors `layout` names as Python does; the last layer is
/// `run`. For what has no module: varve::libtorch::archive does the same for a training state. Throws as archive::stream.
void write_archive(state const& s, detail::python_layout const& layout, commit_values const& values, byte_stream& out);

}  // namespace varve::libtorch
