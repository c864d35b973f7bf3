#pragma once

#include <string>
#include <vector>

namespace varve::tool {

/// How a child process ended and what it wrote to its result pipe.
struct child_result {
    std::string output;
    int exit_code = 0;  ///< 128 + signal number if a signal ended it
    int signal = 0;
};

/// Runs this executable again, in a process of its own, with `args`; `input` is its standard input, its standard output goes to
/// our standard error, and descriptor 3 is the pipe whose bytes come back. A stop signal that arrives meanwhile is passed on
/// (a second one ends the child at once); the child ends if we die. Throws varve::error if it cannot be started.
child_result run_self(std::vector<std::string> const& args, std::string const& input);

inline constexpr int result_descriptor = 3;

}  // namespace varve::tool
