#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "optimizer_state.hpp"
#include "varve/torch/update.hpp"

namespace varve::libtorch::detail {

/// Parameters by the optimizer's group.
using grouped_parameters = std::vector<std::vector<::at::Tensor>>;

/// One call's tensors, which have the same step count.
struct adam_lists {
    std::vector<::at::Tensor> parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs;
};

/// The update of Adam or AdamW for some parameters, with the kernels that take lists of tensors. The lists are made once: only
/// gradients have other addresses from step to step.
class list_update {
public:
    /// `access` is Adam's or AdamW's.
    list_update(optimizer_access& access, update_kind kind, grouped_parameters const& parameters);

    /// Updates what has a gradient. Throws errc::state_changed where the optimizer's tensors are others than they were.
    void run();

    /// What the kernels do not take.
    grouped_parameters& rest() noexcept { return rest_; }
    bool has_rest() const noexcept { return has_rest_; }

private:
    /// Tensors of one group, dtype and device.
    struct bucket {
        std::size_t group = 0;
        std::size_t pass = 0;  ///< which occurrence of its parameters it has: no call gets a parameter twice
        adam_lists lists{};
        std::vector<optimizer_state_key> keys{};
        ::at::Tensor step{};                  ///< for fused: F32 scalar on the parameters' device, filled from the optimizer's own counts
        std::vector<::at::Tensor> steps{};    ///< that one, as often as there are parameters
        std::vector<std::int64_t*> counts{};  ///< the optimizer's, in the step under way; null without a gradient
    };

    void add(::at::Tensor const& parameter, adam_entry const& entry, std::size_t group, std::size_t pass);
    void run(bucket& b);
    void call(bucket& b, adam_lists const& lists, std::int64_t step, adam_options const& o);

    optimizer_access& access_;
    update_kind kind_;
    std::vector<bucket> buckets_;
    grouped_parameters rest_;
    bool has_rest_ = false;
};

}  // namespace varve::libtorch::detail
