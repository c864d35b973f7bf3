#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <fcntl.h>
#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/cuda/error.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace varve::cuda::detail {

/// The driver's functions for memory that has a handle. They are looked up: a program that is linked with the driver does not
/// start where there is none. Source: CUDA Driver API, "Virtual Memory Management".
class memory_calls {
public:
    decltype(&::cuMemCreate) create;
    decltype(&::cuMemRelease) release;
    decltype(&::cuMemAddressReserve) reserve;
    decltype(&::cuMemAddressFree) free_addresses;
    decltype(&::cuMemMap) map;
    decltype(&::cuMemUnmap) unmap;
    decltype(&::cuMemSetAccess) set_access;
    decltype(&::cuMemExportToShareableHandle) export_handle;
    decltype(&::cuMemImportFromShareableHandle) import_handle;

    /// Throws error: errc::unsupported where the driver has them not.
    static memory_calls const& get() {
        static memory_calls const found;
        return found;
    }

private:
    memory_calls() {
        look_up(create, "cuMemCreate");
        look_up(release, "cuMemRelease");
        look_up(reserve, "cuMemAddressReserve");
        look_up(free_addresses, "cuMemAddressFree");
        look_up(map, "cuMemMap");
        look_up(unmap, "cuMemUnmap");
        look_up(set_access, "cuMemSetAccess");
        look_up(export_handle, "cuMemExportToShareableHandle");
        look_up(import_handle, "cuMemImportFromShareableHandle");
    }

    template <class Function>
    static void look_up(Function& to, char const* name) {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        constexpr unsigned least_version = 12000;
        auto const failed = ::cudaGetDriverEntryPointByVersion(name, &found, least_version, cudaEnableDefault, &result);
#else
        auto const failed = ::cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
        throw_if(failed, "the CUDA driver");
        if (result != cudaDriverEntryPointSuccess || !found)
            throw error(errc::unsupported, "the CUDA driver has no " + std::string(name) + "; it is too old to share GPU memory");
        to = reinterpret_cast<Function>(found);
    }
};

/// The driver's results and the runtime's have the same numbers.
inline std::error_code driver_code(CUresult result) noexcept { return cuda::code_of(static_cast<cudaError_t>(result)); }

/// GPU memory with a handle, mapped at an address. Other processes may have it too, and it is there until the last of them lets
/// it go. Move-only.
class handle_memory {
public:
    /// What a region's size is a multiple of: the driver's own granularity on every GPU until now.
    static constexpr std::size_t granularity = 2u << 20;

    handle_memory() noexcept = default;
    /// New memory on the device, at an address that was reserved; the others reach it too. Throws error.
    handle_memory(int device, std::span<int const> others, CUdeviceptr at, std::size_t size_bytes) {
        auto const access = access_of(device, others);
        CUmemAllocationProp what{};
        what.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        what.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        what.location.id = device;
        what.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        CUmemGenericAllocationHandle handle{};
        varve::throw_if(driver_code(memory_calls::get().create(&handle, size_bytes, &what, 0)),
                        "cannot have " + std::to_string(size_bytes) + " bytes of GPU memory to be shared");
        place(handle, access, at, size_bytes);
    }
    /// What another process made. Throws error.
    handle_memory(int device, CUdeviceptr at, std::size_t size_bytes, int descriptor) {
        auto const access = access_of(device, {});
        CUmemGenericAllocationHandle handle{};
        auto* const from = reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor));
        varve::throw_if(driver_code(memory_calls::get().import_handle(&handle, from, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)),
                        "cannot have another process's GPU memory");
        place(handle, access, at, size_bytes);
    }
    handle_memory(handle_memory&& other) noexcept : handle_(other.handle_), at_(std::exchange(other.at_, 0)), size_bytes_(other.size_bytes_) {}
    handle_memory& operator=(handle_memory&&) = delete;
    ~handle_memory() {
        if (at_ == 0) return;
        memory_calls::get().unmap(at_, size_bytes_);
        memory_calls::get().release(handle_);
    }

    /// A descriptor for other processes. Throws error.
    file_descriptor share() const {
        int descriptor = -1;
        varve::throw_if(driver_code(memory_calls::get().export_handle(&descriptor, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0)),
                        "cannot share GPU memory");
        file_descriptor out(descriptor, system_calls::kernel());
        // A program that is started meanwhile must not keep the memory.
        if (::fcntl(descriptor, F_SETFD, FD_CLOEXEC) != 0) varve::throw_if(last_system_error(errno), "cannot share GPU memory");
        return out;
    }

private:
    static std::vector<CUmemAccessDesc> access_of(int device, std::span<int const> others) {
        std::vector<CUmemAccessDesc> out;
        auto allow = [&](int whom) {
            if (std::ranges::any_of(out, [&](auto const& a) { return a.location.id == whom; })) return;
            out.push_back({{CU_MEM_LOCATION_TYPE_DEVICE, whom}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
        };
        allow(device);
        std::ranges::for_each(others, allow);
        return out;
    }

    void place(CUmemGenericAllocationHandle handle, std::span<CUmemAccessDesc const> access, CUdeviceptr at, std::size_t size_bytes) {
        auto const& driver = memory_calls::get();
        auto failed = driver_code(driver.map(at, size_bytes, 0, handle, 0));
        if (!failed) {
            if ((failed = driver_code(driver.set_access(at, size_bytes, access.data(), access.size())))) driver.unmap(at, size_bytes);
        }
        if (failed) {
            driver.release(handle);
            throw error(failed, "cannot map GPU memory: " + failed.message());
        }
        handle_ = handle;
        at_ = at;
        size_bytes_ = size_bytes;
    }

    CUmemGenericAllocationHandle handle_{};
    CUdeviceptr at_ = 0;
    std::size_t size_bytes_ = 0;
};

/// A stretch of addresses with nothing behind them. Move-only.
class address_range {
public:
    explicit address_range(std::size_t size_bytes) : size_bytes_(size_bytes) {
        varve::throw_if(driver_code(memory_calls::get().reserve(&begin_, size_bytes, 0, 0, 0)), "addresses for GPU memory");
    }
    address_range(address_range&& other) noexcept : begin_(std::exchange(other.begin_, 0)), size_bytes_(other.size_bytes_) {}
    address_range& operator=(address_range&&) = delete;
    ~address_range() {
        if (begin_ != 0) memory_calls::get().free_addresses(begin_, size_bytes_);
    }

    CUdeviceptr begin() const noexcept { return begin_; }

private:
    CUdeviceptr begin_ = 0;
    std::size_t size_bytes_ = 0;
};

}  // namespace varve::cuda::detail
