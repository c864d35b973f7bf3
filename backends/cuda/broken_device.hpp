#pragma once

#include <cuda_runtime_api.h>

namespace varve_test {

/// Launches a kernel that writes where nothing is.
void break_device(cudaStream_t stream);

}  // namespace varve_test
