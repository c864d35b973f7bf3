#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "varve/state.hpp"

namespace varve::libtorch::detail {

/// What a state says of the tensor. Throws errc::unsupported for one that cannot be saved: sparse, lazy, of a dtype that the
/// format has not, or in memory that is neither the host's nor CUDA's.
varve::tensor described(std::string name, ::at::Tensor const& t);

/// A tensor as the state describes it, for the question that every save asks about every tensor: is it that still?
///
/// After a training step nothing of the answer is in the processor's caches, and they are hundreds of tensors: what is compared
/// lies here side by side, and what it is compared with can be fetched ahead.
class watched_tensor {
public:
    /// `as` is what described() said of `t`.
    watched_tensor(::at::Tensor const& t, varve::tensor as);

    /// Whether `t` lies where the tensor lay, with its dtype, shape and strides.
    bool is_still(::at::Tensor const& t) const { return is_untouched(t) || matches(t); }

    /// Has the processor fetch what is_still will look at.
    void fetch() const noexcept {
        for (std::size_t line = 0; line < sizeof(::at::TensorImpl); line += 64) __builtin_prefetch(reinterpret_cast<std::byte const*>(impl_) + line);
        for (std::size_t line = 0; line < 128; line += 64) __builtin_prefetch(reinterpret_cast<std::byte const*>(storage_) + line);
    }

private:
    static constexpr std::size_t most_dimensions = 4;  ///< that are compared quickly

    /// The same object, unchanged: what it is but for those that were replaced.
    bool is_untouched(::at::Tensor const& t) const {
        return t.unsafeGetTensorImpl() == impl_ && dimensions_ <= most_dimensions && t.data_ptr() == data_ && t.dtype() == type_ &&
               t.layout() == ::at::kStrided && t.sizes() == ::at::IntArrayRef(sizes_.data(), dimensions_) &&
               t.strides() == ::at::IntArrayRef(strides_.data(), dimensions_);
    }
    bool matches(::at::Tensor const& t) const;

    ::at::TensorImpl const* impl_;  ///< never followed, since it may be gone
    void const* storage_;
    void* data_;
    ::caffe2::TypeMeta type_;
    std::size_t dimensions_;
    std::array<std::int64_t, most_dimensions> sizes_{}, strides_{};
    std::shared_ptr<varve::tensor const> as_;  ///< for those that were replaced
};

}  // namespace varve::libtorch::detail
