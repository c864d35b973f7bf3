#include "process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <array>
#include <cerrno>
#include <csignal>

#include "varve/error.hpp"
#include "varve/system.hpp"

#include "signals.hpp"

namespace varve::tool {

namespace {

/// An unnamed file with the bytes: unlike a pipe it never blocks the writer.
file_descriptor input_file(std::string const& bytes) {
    file_descriptor file(::memfd_create("varve-settings", MFD_CLOEXEC), system_calls::kernel());
    if (!file || ::write(file.get(), bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()) || ::lseek(file.get(), 0, SEEK_SET) != 0)
        throw_if(last_system_error(errno), "cannot hand the settings to a process of its own");
    return file;
}

[[noreturn]] void become_child(int input, int output, std::vector<char*> const& argv, pid_t parent) noexcept {
    ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (::getppid() != parent) ::_exit(127);
    ::dup2(input, STDIN_FILENO);
    ::dup2(STDERR_FILENO, STDOUT_FILENO);
    // dup2 onto itself would leave the descriptor marked to close at exec.
    if (output == result_descriptor)
        ::fcntl(output, F_SETFD, 0);
    else
        ::dup2(output, result_descriptor);
    ::execv("/proc/self/exe", argv.data());
    ::_exit(127);
}

}  // namespace

child_result run_self(std::vector<std::string> const& args, std::string const& input) {
    auto const settings = input_file(input);
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw_if(last_system_error(errno), "cannot start a process");
    file_descriptor reader(ends[0], system_calls::kernel()), writer(ends[1], system_calls::kernel());

    // Everything that allocates happens before the fork: only async-signal-safe calls may follow in the child.
    std::vector<std::string> words{"varve"};
    words.insert(words.end(), args.begin(), args.end());
    std::vector<char*> argv;
    for (auto& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    auto const parent = ::getpid();
    auto const child = ::fork();
    if (child < 0) throw_if(last_system_error(errno), "cannot start a process");
    if (child == 0) become_child(settings.get(), writer.get(), argv, parent);
    writer.reset();

    child_result result;
    int passed_on = 0;  // one that came before the fork is the child's too
    for (std::array<char, 65536> buffer;;) {
        pollfd wait{reader.get(), POLLIN, 0};
        auto const ready = ::poll(&wait, 1, 100);
        if (auto const count = stop_signals::count(); count != passed_on) {
            ::kill(child, passed_on == 0 ? SIGTERM : SIGKILL);
            passed_on = count;
        }
        if (ready <= 0) continue;
        auto const n = ::read(reader.get(), buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        result.output.append(buffer.data(), static_cast<std::size_t>(n));
    }
    int status = 0;
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    result.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    result.exit_code = result.signal != 0 ? 128 + result.signal : WEXITSTATUS(status);
    return result;
}

}  // namespace varve::tool
