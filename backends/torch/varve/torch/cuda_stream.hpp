#pragma once

#include <cstdint>

struct CUstream_st;

// Built where LibTorch has CUDA and varve its backend `cuda`; the declarations need neither.

namespace varve::libtorch {

/// The stream that LibTorch's work on the current GPU is in, for the calling thread: what saves of its tensors are ordered by.
///
///     ck.before_update_all({varve::libtorch::current_stream()});
CUstream_st* current_stream();

/// The most bytes that LibTorch's tensors have taken on the current GPU so far.
std::uint64_t peak_device_bytes();

}  // namespace varve::libtorch
