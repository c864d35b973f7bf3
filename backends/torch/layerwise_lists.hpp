#pragma once

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>

#include <cstddef>
#include <vector>

#include "varve/torch/layerwise.hpp"

namespace varve::libtorch {

/// The parameters of each layer by group, in the groups' own order. A parameter that a group has twice is there twice:
/// step() would update it twice.
struct layerwise_updater::lists {
    struct layer {
        std::vector<std::vector<::at::Tensor>> of_group;
        bool empty = true;
    };

    ::torch::optim::Optimizer* optimizer = nullptr;
    std::vector<layer> layers;
    std::vector<std::size_t> group_sizes;

    bool fits_optimizer() const {
        auto& groups = optimizer->param_groups();
        if (groups.size() != group_sizes.size()) return false;
        for (std::size_t g = 0; g < groups.size(); ++g)
            if (groups[g].params().size() != group_sizes[g]) return false;
        return true;
    }
};

}  // namespace varve::libtorch
