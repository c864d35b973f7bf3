#include "varve/cuda/detail/digest.hpp"
#include "varve/cuda/detail/gather.hpp"

// Without nvcc: copies are then single calls, one a run of bytes, and the CPU hashes.

namespace varve::cuda::detail {

bool has_kernels() noexcept { return false; }
cudaError_t load_gather() noexcept { return cudaErrorNotSupported; }
cudaError_t load_chunk_digests() noexcept { return cudaErrorNotSupported; }
cudaError_t gather(piece const*, std::size_t, std::byte*, std::byte const*, cudaStream_t) noexcept { return cudaErrorNotSupported; }
cudaError_t gather_strided(strided_source const&, std::uint64_t, std::size_t, std::byte*, cudaStream_t) noexcept { return cudaErrorNotSupported; }
cudaError_t chunk_digests(std::byte const*, std::size_t, std::uint64_t*, cudaStream_t) noexcept { return cudaErrorNotSupported; }

}  // namespace varve::cuda::detail
