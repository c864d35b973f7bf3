#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/cuda/detail/driver_memory.hpp"
#include "varve/cuda/device.hpp"
#include "varve/cuda/error.hpp"
#include "varve/cuda/event.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/detail/block_pool.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::cuda {

/// A GPU's name among all GPUs: 32 hexadecimal digits. Throws error.
inline std::string device_uuid(int device) {
    cudaDeviceProp about{};
    throw_if(::cudaGetDeviceProperties(&about, device), "GPU " + std::to_string(device));
    std::string out;
    for (char c : about.uuid.bytes) {
        constexpr char digits[] = "0123456789abcdef";
        auto const byte = static_cast<unsigned char>(c);
        out += digits[byte / 16];
        out += digits[byte % 16];
    }
    return out;
}

/// GPU memory for a staging pool that another process can have too: it stays as it is when this process dies.
///
/// One stretch of addresses on the calling thread's device, in regions of at most 1 GiB, each with a descriptor of its own.
/// Source: CUDA Driver API, "Virtual Memory Management".
class shared_memory {
public:
    struct region {
        std::span<std::byte> memory;
        file_descriptor descriptor;
    };

    /// Allocates `pool_bytes`, rounded down to whole blocks but at least one. `block_bytes` is a multiple of 2 MiB. `others`:
    /// further GPUs, by index, that tensors to be staged here lie on; each needs peer access to the calling thread's. Throws error
    /// with the code of CUDA: equal to std::errc::not_enough_memory where the GPU has no more.
    shared_memory(std::size_t pool_bytes, std::size_t block_bytes, std::span<int const> others = {}) {
        if (block_bytes == 0 || block_bytes % detail::handle_memory::granularity != 0)
            throw error(std::make_error_code(std::errc::invalid_argument), "blocks of GPU memory that is shared are multiples of 2 MiB");
        relaxed_capture relaxed;
        int device = 0;
        throw_if(::cudaGetDevice(&device), "the current device");
        throw_if(::cudaFree(nullptr), "the current device");  // the driver's functions want its context
        device_ = device_uuid(device);
        auto const size_bytes = std::max<std::size_t>(1, pool_bytes / block_bytes) * block_bytes;
        try {
            addresses_.emplace(size_bytes);
            auto* const begin = reinterpret_cast<std::byte*>(addresses_->begin());
            for (auto part : varve::detail::regions_of({begin, size_bytes}, block_bytes)) {
                auto const& memory = memory_.emplace_back(device, others, reinterpret_cast<CUdeviceptr>(part.data()), part.size());
                regions_.push_back({part, memory.share()});
            }
        } catch (error const& e) {
            throw error(e.code(), "staging pool of " + std::to_string(size_bytes) + " bytes: " + e.what() +
                                      (e.code() == std::errc::not_enough_memory ? "; give a smaller pool" : ""));
        }
    }

    shared_memory(shared_memory const&) = delete;
    shared_memory& operator=(shared_memory const&) = delete;

    std::string const& device() const noexcept { return device_; }
    std::span<region> regions() noexcept { return regions_; }

private:
    std::string device_;
    std::optional<detail::address_range> addresses_;
    std::vector<detail::handle_memory> memory_;
    std::vector<region> regions_;
};

/// GPU memory of another process's, for reading, whether or not that one is still there. One thread's, which is on its device from
/// then on: to go back to another would begin to use that one too.
class imported_memory {
public:
    /// `device` is what device_uuid says of it. Throws error: errc::unsupported where this process has no such GPU.
    imported_memory(file_descriptor descriptor, std::size_t size_bytes, std::string const& device) {
        auto const index = index_of(device);
        throw_if(::cudaSetDevice(index), "the trainer's GPU");
        throw_if(::cudaFree(nullptr), "the trainer's GPU");
        stream_.emplace(true);
        copied_ = std::make_shared<event_pool>(1);
        addresses_.emplace(size_bytes);
        memory_.emplace(index, addresses_->begin(), size_bytes, descriptor.get());
    }

    /// Host memory that read() is fast to. Throws error.
    std::shared_ptr<std::byte> host_memory(std::size_t size_bytes) const {
        auto memory = std::make_shared<page_locked>(size_bytes);
        auto* const data = memory->data();
        return {std::move(memory), data};
    }

    /// Copies bytes from `offset_bytes` on; they are there when it returns. The thread sleeps meanwhile.
    std::error_code read(std::uint64_t offset_bytes, std::span<std::byte> to) noexcept {
        auto const* from = reinterpret_cast<std::byte const*>(addresses_->begin()) + offset_bytes;
        auto const failed = code_of(::cudaMemcpyAsync(to.data(), from, to.size(), cudaMemcpyDefault, stream_->get()));
        return copied_->mark(stream_->get(), failed).wait();
    }

private:
    static int index_of(std::string const& device) {
        int count = 0;
        throw_if(::cudaGetDeviceCount(&count), "GPUs");
        for (int i = 0; i < count; ++i)
            if (device_uuid(i) == device) return i;
        throw error(errc::unsupported, "the trainer's GPU is none of the " + std::to_string(count) + " that are to be seen here");
    }

    std::optional<side_stream> stream_;
    std::shared_ptr<event_pool> copied_;
    std::optional<detail::address_range> addresses_;
    std::optional<detail::handle_memory> memory_;
};

}  // namespace varve::cuda
