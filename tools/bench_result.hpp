#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace varve::tool {

/// The runs of one method, a repeat each, as bench-run measured them; names that begin with `_` are for the parent alone.
struct method_runs {
    std::string name;
    std::string result_key;
    std::vector<nlohmann::json> runs;
};

/// What a comparison came to.
struct comparison {
    nlohmann::json results;           ///< keyed as in the result file
    nlohmann::json effective;         ///< what took effect, a method each
    std::vector<std::string> faults;  ///< why the comparison does not count: one line each
};

/// Pairs every run with the run of `none` of the same repeat, adds overheads and floors (`best_write_gb_per_s` of the same
/// repeat, 0 where it was not measured), and takes medians. `methods` begins with none.
comparison compare_runs(std::vector<method_runs> methods, std::vector<double> const& best_write_gb_per_s);

/// The table that bench prints.
std::string comparison_table(nlohmann::json const& results, std::vector<std::string> const& order);

/// Writes the document as DIR/comparison_<time><suffix>.json, whole or not at all; returns its path.
std::filesystem::path write_result(std::filesystem::path const& dir, std::string const& suffix, nlohmann::json const& document);

/// The current time, UTC, as in 2026-11-23T20:00:00Z.
std::string utc_now();

}  // namespace varve::tool
