#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <set>
#include <utility>
#include <vector>

#include "varve/state.hpp"

namespace varve::libtorch::detail {

/// The states of LibTorch's default generators, the CPU's and those of the given GPUs, mirrored in tensors of host memory. Holds
/// each generator's lock while it is read or set.
class random_state {
public:
    /// Adds `rng.cpu` and a `rng.cuda.<index>` for each GPU to the layer. They stay valid as long as this does.
    random_state(std::set<::c10::DeviceIndex> const& gpus, varve::layer& to);

    /// Generators to tensors. Throws error with errc::unsupported where a GPU's generator cannot be read.
    void refresh();
    /// Tensors to generators. Throws error with errc::malformed for what is no state of one.
    void restore() const;

private:
    /// All that a generator on the CPU draws from.
    struct engine_state {
        ::at::mt19937_data_pod engine;
        decltype(std::declval<::at::CPUGeneratorImpl&>().next_float_normal_sample()) next_float;
        decltype(std::declval<::at::CPUGeneratorImpl&>().next_double_normal_sample()) next_double;

        bool is(::at::mt19937_data_pod const& e, ::at::CPUGeneratorImpl& g) const {
            return e.seed_ == engine.seed_ && e.left_ == engine.left_ && e.seeded_ == engine.seeded_ && e.next_ == engine.next_ &&
                   e.state_ == engine.state_ && g.next_float_normal_sample() == next_float && g.next_double_normal_sample() == next_double;
        }
    };

    ::at::Tensor cpu_;
    ::at::Tensor cpu_now_;  ///< what the generator gave when it was last asked, and
    engine_state engine_of_cpu_now_;
    std::vector<std::pair<::at::Generator, ::at::Tensor>> gpus_;
};

}  // namespace varve::libtorch::detail
