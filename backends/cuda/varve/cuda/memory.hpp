#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "varve/cuda/detail/paged_memory.hpp"
#include "varve/cuda/error.hpp"

namespace varve::cuda {

/// Page-locked host memory that every GPU copies to and from, and reads in kernels.
class page_locked {
public:
    page_locked() noexcept = default;
    /// Throws error with the code of CUDA: equal to std::errc::not_enough_memory where no more can be page-locked.
    explicit page_locked(std::size_t size_bytes) : size_bytes_(size_bytes) {
        void* memory = nullptr;
        throw_if(::cudaHostAlloc(&memory, size_bytes, cudaHostAllocPortable), "cannot page-lock " + std::to_string(size_bytes) + " bytes");
        data_ = static_cast<std::byte*>(memory);
    }
    /// The same of one NUMA node; a negative one stands for any. Throws too where nothing can be bound to that node.
    page_locked(std::size_t size_bytes, int numa_node) {
        if (numa_node < 0) {
            *this = page_locked(size_bytes);
            return;
        }
        own_ = detail::paged_memory(size_bytes, numa_node);
        throw_if(::cudaHostRegister(own_.data(), whole_pages(size_bytes), cudaHostRegisterPortable),
                 "cannot page-lock " + std::to_string(size_bytes) + " bytes of NUMA node " + std::to_string(numa_node));
        data_ = own_.data();
        size_bytes_ = size_bytes;
    }
    /// The same for what is waited for: a few MB in huge pages, which are there in a fraction of the time that CUDA's own takes.
    static page_locked in_huge_pages(std::size_t size_bytes) {
        page_locked out;
        out.own_ = detail::paged_memory(size_bytes);
        auto const refused = code_of(::cudaHostRegister(out.own_.data(), whole_pages(size_bytes), cudaHostRegisterPortable));
        if (!refused) {
            out.data_ = out.own_.data();
            out.size_bytes_ = size_bytes;
            return out;
        }
        if (refused != std::errc::not_enough_memory) return page_locked(size_bytes);
        throw error(refused, "cannot page-lock " + std::to_string(size_bytes) + " bytes: " + refused.message());
    }
    page_locked(page_locked&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_bytes_(other.size_bytes_), own_(std::move(other.own_)) {}
    page_locked& operator=(page_locked&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_bytes_, other.size_bytes_);
        std::swap(own_, other.own_);
        return *this;
    }
    ~page_locked() {
        if (!data_) return;
        if (own_.data())
            ::cudaHostUnregister(data_);
        else
            ::cudaFreeHost(data_);
    }

    std::byte* data() const noexcept { return data_; }
    std::span<std::byte> bytes() const noexcept { return {data_, size_bytes_}; }

private:
    static constexpr std::size_t whole_pages(std::size_t size_bytes) noexcept { return (size_bytes + 4095) / 4096 * 4096; }

    std::byte* data_ = nullptr;
    std::size_t size_bytes_ = 0;
    detail::paged_memory own_;  ///< what data_ is, where it is not CUDA's
};

/// Page-locks memory of somebody else's, such as a shared mapping, for as long as it lives.
/// Source: CUDA Runtime API, cudaHostRegister.
class page_lock {
public:
    /// `memory` is aligned to 4,096 bytes. Throws error as page_locked does.
    explicit page_lock(std::span<std::byte> memory) {
        throw_if(::cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterPortable),
                 "cannot page-lock " + std::to_string(memory.size()) + " bytes");
        data_ = memory.data();
    }
    page_lock(page_lock&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    page_lock& operator=(page_lock&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~page_lock() {
        if (data_) ::cudaHostUnregister(data_);
    }

private:
    std::byte* data_ = nullptr;
};

/// GPU memory that other devices may be told of: an allocation of its own. Giving it back waits for the whole device.
class device_bytes {
public:
    static constexpr std::size_t alignment = 64u << 10;

    device_bytes() noexcept = default;
    /// On the calling thread's device, at a multiple of `alignment`. Throws error.
    explicit device_bytes(std::size_t size_bytes) : size_bytes_(size_bytes) {
        throw_if(::cudaMalloc(&memory_, size_bytes + alignment - 1), "cannot have " + std::to_string(size_bytes) + " bytes of GPU memory");
        auto const address = reinterpret_cast<std::uintptr_t>(memory_);
        data_ = static_cast<std::byte*>(memory_) + ((address + alignment - 1) / alignment * alignment - address);
    }
    device_bytes(device_bytes&& other) noexcept
        : memory_(std::exchange(other.memory_, nullptr)), data_(std::exchange(other.data_, nullptr)), size_bytes_(other.size_bytes_) {}
    device_bytes& operator=(device_bytes&& other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(data_, other.data_);
        std::swap(size_bytes_, other.size_bytes_);
        return *this;
    }
    ~device_bytes() {
        if (memory_) ::cudaFree(memory_);
    }

    std::byte* data() const noexcept { return data_; }
    std::span<std::byte> bytes() const noexcept { return {data_, size_bytes_}; }

private:
    void* memory_ = nullptr;
    std::byte* data_ = nullptr;
    std::size_t size_bytes_ = 0;
};

/// GPU memory, taken and given back in the order of a stream's work: a plain cudaFree would wait for the whole device.
class stream_memory {
public:
    stream_memory() noexcept = default;
    /// On the calling thread's device, in a stream that outlives it; there when this returns. Throws error.
    stream_memory(std::size_t size_bytes, cudaStream_t stream) : stream_(stream) {
        void* memory = nullptr;
        throw_if(::cudaMallocAsync(&memory, size_bytes, stream), "cannot have " + std::to_string(size_bytes) + " bytes of GPU memory");
        data_ = static_cast<std::byte*>(memory);
        auto ec = code_of(::cudaStreamSynchronize(stream));
        if (!ec) return;
        ::cudaFreeAsync(data_, stream);
        throw error(ec);
    }
    stream_memory(stream_memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), stream_(other.stream_) {}
    stream_memory& operator=(stream_memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(stream_, other.stream_);
        return *this;
    }
    ~stream_memory() {
        if (data_) ::cudaFreeAsync(data_, stream_);
    }

    std::byte* data() const noexcept { return data_; }

private:
    std::byte* data_ = nullptr;
    cudaStream_t stream_ = nullptr;
};

}  // namespace varve::cuda
