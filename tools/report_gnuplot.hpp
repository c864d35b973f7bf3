#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace varve::tool::reporting {

/// gnuplot in PATH, or nothing.
std::optional<std::filesystem::path> find_gnuplot();

/// Text as a gnuplot string literal; what gnuplot could take for a command, a macro or the string's end is replaced.
std::string gnuplot_string(std::string const& text);

/// Runs a script that draws one SVG to standard output, and returns it; throws std::runtime_error where that fails.
std::string run_gnuplot(std::filesystem::path const& gnuplot, std::string const& script);

}  // namespace varve::tool::reporting
