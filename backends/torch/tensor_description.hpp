#pragma once

#include <ATen/ATen.h>

#include <string>

#include "varve/state.hpp"

namespace varve::libtorch::detail {

/// What a state says of the tensor. Throws errc::unsupported for one that cannot be saved: sparse, lazy, of a dtype that the
/// format has not, or in memory that is neither the host's nor CUDA's.
varve::tensor described(std::string name, ::at::Tensor const& t);

/// Whether `t` is still what the state says.
bool still(::at::Tensor const& t, varve::tensor const& as);

}  // namespace varve::libtorch::detail
