#pragma once

#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>

#include <cstddef>
#include <map>
#include <utility>
#include <vector>

#include "list_update.hpp"
#include "optimizer_state.hpp"
#include "varve/torch/layerwise.hpp"

namespace varve::libtorch {

/// The parameters of each layer by group, in the groups' own order. A parameter that a group has twice is there twice:
/// step() would update it twice.
struct layerwise_updater::lists {
    ::torch::optim::Optimizer* optimizer = nullptr;
    detail::optimizer_access* access = nullptr;
    update_kind kind = update_kind::plain;
    std::vector<detail::grouped_parameters> layers;
    std::vector<layer_range> groups;
    std::vector<std::size_t> group_sizes;
    /// Made when a range is updated for the first time.
    std::map<std::pair<std::size_t, std::size_t>, detail::list_update> of_range;

    bool fits_optimizer() const {
        auto& of = optimizer->param_groups();
        if (of.size() != group_sizes.size()) return false;
        for (std::size_t g = 0; g < of.size(); ++g)
            if (of[g].params().size() != group_sizes[g]) return false;
        return true;
    }

    /// Ranges of the layers before the last, each of about an equal share of `bytes`, which has one entry a layer.
    void cut(std::vector<std::size_t> const& bytes, std::size_t into);
};

}  // namespace varve::libtorch
