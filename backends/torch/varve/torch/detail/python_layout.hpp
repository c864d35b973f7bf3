#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace varve::libtorch::detail {

/// One option of a parameter group, as Python's torch.optim names it, and where its value comes from.
struct python_option {
    enum class source {
        number,   ///< the state's `optimizer.group.<i>.<name>`
        boolean,  ///< the same, not 0
        pair,     ///< the state's `optimizer.group.<i>.<name>.0` and `.1`
        none,
        always_false,
        always_true
    };
    std::string name;
    source from;
};

/// Those of torch.optim.Adam, and of AdamW where the weight decay is decoupled.
inline std::vector<python_option> python_adam_options(bool decoupled) {
    using enum python_option::source;
    return {{"lr", number},
            {"betas", pair},
            {"eps", number},
            {"weight_decay", number},
            {"amsgrad", boolean},
            {"maximize", always_false},
            {"foreach", none},
            {"capturable", always_false},
            {"differentiable", always_false},
            {"fused", none},
            {"decoupled_weight_decay", decoupled ? always_true : always_false}};
}

/// Those of torch.optim.SGD.
inline std::vector<python_option> python_sgd_options() {
    using enum python_option::source;
    return {{"lr", number},        {"momentum", number},       {"dampening", number}, {"weight_decay", number},
            {"nesterov", boolean}, {"maximize", always_false}, {"foreach", none},     {"differentiable", always_false},
            {"fused", none}};
}

struct python_group {
    std::vector<python_option> options;
    std::vector<std::size_t> parameters;  ///< indices in python_layout::parameters
};

/// How Python's state_dict of the module and of its optimizer name a varve::state's tensors.
struct python_layout {
    std::vector<std::pair<std::string, std::string>> model;  ///< name in the module's state_dict, name in the state
    std::vector<std::string> parameters;                     ///< of the optimizer, in the order of its groups, each once
    std::vector<python_group> groups;
};

}  // namespace varve::libtorch::detail
