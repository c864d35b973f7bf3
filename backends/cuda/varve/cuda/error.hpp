#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <system_error>

#include "varve/error.hpp"

namespace varve::cuda {

/// The category of cudaError_t; its name is "cuda". Running out of memory compares equal to std::errc::not_enough_memory.
inline std::error_category const& category() noexcept {
    class category_type final : public std::error_category {
        char const* name() const noexcept override { return "cuda"; }
        std::string message(int value) const override { return std::string("CUDA: ") + ::cudaGetErrorString(static_cast<cudaError_t>(value)); }
        std::error_condition default_error_condition(int value) const noexcept override {
            if (value == cudaErrorMemoryAllocation) return std::errc::not_enough_memory;
            return {value, *this};
        }
    };
    static category_type const instance;
    return instance;
}

/// The code of a call's result; nothing for success. Takes the error off the calling thread's record, so that nobody else
/// (LibTorch looks there after every kernel) mistakes it for his own.
inline std::error_code code_of(cudaError_t result) noexcept {
    if (result == cudaSuccess) return {};
    ::cudaGetLastError();
    return {static_cast<int>(result), category()};
}

/// Throws error with `what: message` when the call failed.
inline void throw_if(cudaError_t result, std::string const& what) { varve::throw_if(code_of(result), what); }

}  // namespace varve::cuda
