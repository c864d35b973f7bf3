#include "varve/torch/cuda_stream.hpp"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

namespace varve::libtorch {

CUstream_st* current_stream() { return ::c10::cuda::getCurrentCUDAStream().stream(); }

std::uint64_t peak_device_bytes() {
    auto const stats = ::c10::cuda::CUDACachingAllocator::getDeviceStats(::c10::cuda::current_device());
    return static_cast<std::uint64_t>(stats.allocated_bytes[0].peak);
}

}  // namespace varve::libtorch
