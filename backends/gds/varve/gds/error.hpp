#pragma once

#include <string>
#include <system_error>

#include "varve/cuda/error.hpp"
#include "varve/error.hpp"

namespace varve::gds {

namespace detail {

/// What cuFile says of its error, a CUfileOpError, or of `no_library`.
char const* message_of(int value) noexcept;

inline constexpr int first_of_cufile = 5000;
inline constexpr int no_library = 90'000;  ///< beside the CUfileOpError
inline constexpr int first_of_cuda = 100'000;

}  // namespace detail

/// The category of cuFile's errors, CUfileOpError; its name is "cufile". Source: cuFile API Reference, "CUfileOpError".
inline std::error_category const& category() noexcept {
    class category_type final : public std::error_category {
        char const* name() const noexcept override { return "cufile"; }
        std::string message(int value) const override { return std::string("cuFile: ") + detail::message_of(value); }
    };
    static category_type const instance;
    return instance;
}

/// The code of a failure as one number: an errno, a CUfileOpError, or one of CUDA's above first_of_cuda; nothing for 0.
inline std::error_code code_of(int failure) noexcept {
    if (failure == 0) return {};
    if (failure >= detail::first_of_cuda) return {failure - detail::first_of_cuda, cuda::category()};
    if (failure >= detail::first_of_cufile) return {failure, category()};
    return last_system_error(failure);
}

}  // namespace varve::gds
