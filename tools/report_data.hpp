#pragma once

#include <nlohmann/json.hpp>

#include <filesystem>
#include <iosfwd>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// The parts of `varve report`: reading results, then findings, tables and charts made from them.
namespace varve::tool::reporting {

using json = nlohmann::json;

/// The value at a path such as "checkpoint.mean_ms", or null where any part of it is missing.
json const* find_value(json const& object, std::string_view path);
/// The finite number at a path; results leave out what does not apply, so every reader copes with none.
std::optional<double> find_number(json const& object, std::string_view path);
std::string find_text(json const& object, std::string_view path);

/// One method of one result.
struct method_result {
    std::string name;    ///< The key in `results`, control characters replaced.
    std::string label;   ///< Short name for charts.
    std::string colour;  ///< `#rrggbb`, the same for a method all over the report.
    json values;

    std::optional<double> number(std::string_view path) const { return find_number(values, path); }
    /// The number in each repeat, in their order; empty where the method ran once.
    std::vector<double> repeats(std::string_view path) const;
};

/// One result file.
struct result_file {
    std::string file_name;
    json document;
    std::vector<method_result> methods;  ///< none first, then traditional, original, layerwise, the others by name.

    method_result const* method(std::string_view name) const;
    method_result const* none() const;
    /// What ratios are taken against: traditional, or its durable form where that one ran alone; may be null.
    method_result const* traditional() const;
    std::optional<double> number(std::string_view path) const { return find_number(document, path); }
    std::string text(std::string_view path) const { return find_text(document, path); }
    std::optional<double> checkpoint_freq() const { return number("config.training.checkpoint_freq"); }
    std::string frequency_words() const;
};

/// Results that are told together: one, or several that differ in the checkpoint frequency alone.
struct result_group {
    std::string title;
    std::vector<result_file const*> files;  ///< By frequency.
    bool earlier = false;                   ///< The same was run again later; it gets no charts.

    bool swept() const { return files.size() > 1; }
};

inline constexpr std::string_view none_name = "No Checkpoint";
inline constexpr std::string_view traditional_name = "Traditional PyTorch Checkpoint";
inline constexpr std::string_view durable_name = "Traditional PyTorch Checkpoint (durable)";

/// Reads the results in a folder, oldest first; throws std::runtime_error if there is none.
std::vector<result_file> load_results(std::filesystem::path const& folder, std::ostream& err);
std::vector<result_group> group_results(std::vector<result_file> const& results);

/// A number with so many significant digits, never in scientific notation for what a report holds.
std::string format_number(double value, int digits = 3);
/// Text without control characters, safe on a terminal and in one line.
std::string plain_text(std::string_view text);
/// The same, safe inside a Markdown sentence or table cell.
std::string markdown_text(std::string_view text);

/// Whether a ratio of two methods differs from 1 by more than the noise.
struct noise_verdict {
    double ratio = 1;          ///< Median of paired repeats, or the ratio of the only run.
    bool within_noise = true;  ///< 1 is inside the interval.
    double low = 1, high = 1;  ///< 95% interval, or ratio -+ what counts as noise in one run.
    std::size_t repeats = 1;
};

/// The median of at least two ratios, each of two neighbours, and its interval.
noise_verdict judge(std::vector<double> ratios);

/// What one run's difference must exceed, in percent: the rule stands in report_noise.cpp.
double single_run_noise_percent(result_file const& file);
/// Compares `path` of two methods; repeats are paired because methods take turns.
std::optional<noise_verdict> compare(result_file const& file, method_result const& method, method_result const& base, std::string_view path);

/// Markdown bullets: what the numbers of a group say.
std::string findings(result_group const& group);
/// Markdown tables of a group.
std::string tables(result_group const& group);
/// Markdown: machine, probe, configuration and command of every result.
std::string provenance(std::vector<result_file> const& results);

/// A chart that was drawn.
struct chart {
    std::string suffix;  ///< What follows the report's stem in the file name, `.svg` included.
    std::string title;
    std::string svg;
};

/// Draws the charts of a group with the gnuplot at that path; `prefix` tells groups apart in file names.
/// Throws std::runtime_error where gnuplot fails.
std::vector<chart> draw_charts(result_group const& group, std::string const& prefix, std::filesystem::path const& gnuplot);

}  // namespace varve::tool::reporting
