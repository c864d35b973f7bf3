#pragma once

#include <string>
#include <vector>

#include "settings.hpp"

namespace varve::tool {

/// One comparison of a bench, which makes one result file.
struct planned_comparison {
    settings chosen;
    std::string title;   ///< for the user
    std::string suffix;  ///< of the result file's name
};

/// The comparisons that a scenario asks for (one without a scenario), each checked; throws usage_error. `notes` gets what is
/// left out and why.
std::vector<planned_comparison> plan_bench(given_settings const& given, std::string const& scenario, std::vector<std::string>& notes);

/// Throws usage_error for a model whose training takes more memory than can be used.
void check_memory(settings const& s);

/// What --dry-run prints.
std::string describe_plan(std::vector<planned_comparison> const& plan);

/// What --list prints.
std::string list_methods();

}  // namespace varve::tool
