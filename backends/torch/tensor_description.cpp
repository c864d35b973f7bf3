#include "tensor_description.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "varve/error.hpp"

namespace varve::libtorch::detail {

namespace {

/// By name, since LibTorch 1.13 has not all of them; looked up once, since every save asks for every tensor.
std::optional<varve::dtype> dtype_of(::at::Tensor const& t) noexcept {
    static constexpr std::array<std::pair<std::string_view, varve::dtype>, 16> names{{{"Bool", dtype::BOOL},
                                                                                      {"Byte", dtype::U8},
                                                                                      {"Char", dtype::I8},
                                                                                      {"Float8_e5m2", dtype::F8_E5M2},
                                                                                      {"Float8_e4m3fn", dtype::F8_E4M3},
                                                                                      {"Short", dtype::I16},
                                                                                      {"UInt16", dtype::U16},
                                                                                      {"Half", dtype::F16},
                                                                                      {"BFloat16", dtype::BF16},
                                                                                      {"Int", dtype::I32},
                                                                                      {"UInt32", dtype::U32},
                                                                                      {"Float", dtype::F32},
                                                                                      {"ComplexFloat", dtype::C64},
                                                                                      {"Double", dtype::F64},
                                                                                      {"Long", dtype::I64},
                                                                                      {"UInt64", dtype::U64}}};
    static auto const known = [] {
        std::array<std::optional<varve::dtype>, static_cast<std::size_t>(::at::ScalarType::NumOptions)> by_type;
        for (std::size_t i = 0; i < by_type.size(); ++i) {
            std::string_view const wanted = ::c10::toString(static_cast<::at::ScalarType>(i));
            auto it = std::find_if(names.begin(), names.end(), [&](auto const& n) { return n.first == wanted; });
            if (it != names.end()) by_type[i] = it->second;
        }
        return by_type;
    }();
    return known.at(static_cast<std::size_t>(t.scalar_type()));
}

}  // namespace

varve::tensor described(std::string name, ::at::Tensor const& t) {
    auto refuse = [&](std::string const& why) { throw error(errc::unsupported, "cannot save tensor " + name + ": " + why); };
    if (t.layout() != ::at::kStrided) refuse("it is sparse");
    if (t.is_conj() || t.is_neg()) refuse("it is a lazy conjugate or negative; resolve it first");
    auto type = dtype_of(t);
    if (!type) refuse("its dtype is " + std::string(::c10::toString(t.scalar_type())));
    if (!t.is_cpu() && !t.is_cuda()) refuse("it is neither in host nor in CUDA memory");
    return {.name = std::move(name),
            .type = *type,
            .shape = t.sizes().vec(),
            .data = t.data_ptr(),
            .strides = t.is_contiguous() ? std::vector<std::int64_t>() : t.strides().vec(),
            .memory = t.is_cuda() ? memory_kind::device : memory_kind::host};
}

watched_tensor::watched_tensor(::at::Tensor const& t, varve::tensor as)
    : impl_(t.unsafeGetTensorImpl()), storage_(t.storage().unsafeGetStorageImpl()), data_(t.data_ptr()), type_(t.dtype()),
      dimensions_(static_cast<std::size_t>(t.dim())), as_(std::make_shared<varve::tensor const>(std::move(as))) {
    if (dimensions_ > most_dimensions) return;
    std::copy(t.sizes().begin(), t.sizes().end(), sizes_.begin());
    std::copy(t.strides().begin(), t.strides().end(), strides_.begin());
}

bool watched_tensor::matches(::at::Tensor const& t) const {
    auto const& as = *as_;
    if (!t.defined() || t.layout() != ::at::kStrided || t.data_ptr() != as.data || dtype_of(t) != as.type || t.sizes() != ::at::IntArrayRef(as.shape))
        return false;
    return as.strides.empty() ? t.is_contiguous() : t.strides() == ::at::IntArrayRef(as.strides);
}

}  // namespace varve::libtorch::detail
