#include "gpu_reader.hpp"

#include "build_config.hpp"

#if VARVE_TOOL_WITH_CUDA_RUNTIME

#include <utility>

#include "varve/cuda/shared_memory.hpp"

namespace varve::tool {

namespace {

class reader final : public asio::device_reader {
public:
    explicit reader(cuda::imported_memory memory) : memory_(std::move(memory)) {}
    std::shared_ptr<std::byte> host_memory(std::size_t size_bytes) override { return memory_.host_memory(size_bytes); }
    std::error_code read(std::uint64_t offset_bytes, std::span<std::byte> to) noexcept override { return memory_.read(offset_bytes, to); }

private:
    cuda::imported_memory memory_;
};

}  // namespace

std::function<std::unique_ptr<asio::device_reader>(file_descriptor, std::uint64_t, std::string const&)> gpu_reader() {
    return [](file_descriptor region, std::uint64_t size_bytes, std::string const& device) {
        return std::make_unique<reader>(cuda::imported_memory(std::move(region), size_bytes, device));
    };
}

}  // namespace varve::tool

#else

namespace varve::tool {

std::function<std::unique_ptr<asio::device_reader>(file_descriptor, std::uint64_t, std::string const&)> gpu_reader() { return {}; }

}  // namespace varve::tool

#endif
