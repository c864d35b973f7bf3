#pragma once

#include <filesystem>
#include <iosfwd>

namespace varve::tool {

/// What `varve report` is asked to do.
struct report_options {
    std::filesystem::path input_dir;    ///< Folder whose `*.json` results are read; folders below it are not.
    std::filesystem::path output_file;  ///< The Markdown to write; charts stand beside it as `<stem>_*.svg`.
};

/// Writes the report on every result in a folder: findings in words, tables, charts, machine and commands.
///
/// Which files are results is judged by their content; others are skipped with a line on `err`. The findings and the
/// place of the report go to `out`. Charts need gnuplot in PATH; without it the report holds the tables alone and says
/// so.
///
/// Returns 0. Throws std::runtime_error, one line of what, where and what to do, where no result can be read or the
/// report cannot be written; an older report is left as it was then.
int write_report(report_options const& options, std::ostream& out, std::ostream& err);

}  // namespace varve::tool
