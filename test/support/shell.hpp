#pragma once

#include <csignal>
#include <cstdlib>
#include <string>

namespace varve_test {

/// std::system, whose answer says how the command ended. Older Boost.Test takes SIGCHLD for a failure, and std::system keeps it from
/// the calling thread alone: with other threads in the process (LibTorch's on a GPU) a command that fails would end the
/// test by a jump out of the wrong thread.
inline int shell(std::string const& command) {
    using action = struct ::sigaction;
    action plain{}, before{};
    plain.sa_handler = SIG_DFL;
    ::sigaction(SIGCHLD, &plain, &before);
    auto const status = std::system(command.c_str());
    ::sigaction(SIGCHLD, &before, nullptr);
    return status;
}

}  // namespace varve_test
