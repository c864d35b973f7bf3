#pragma once

#include <cuda_runtime_api.h>

namespace varve::cuda {

/// What orders copies against the training: the stream that its updates are in.
struct stream_order {
    cudaStream_t stream = nullptr;  ///< nullptr: the default stream
    int device = -1;                ///< that the stream belongs to; negative: the one that the calling thread is on
};

}  // namespace varve::cuda
