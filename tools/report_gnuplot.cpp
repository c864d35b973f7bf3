#include "report_gnuplot.hpp"

#include "report_data.hpp"

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace varve::tool::reporting {

namespace {

class file_descriptor {
public:
    explicit file_descriptor(int value) : value_(value) {
        if (value < 0) throw std::runtime_error("cannot start gnuplot: " + std::system_category().message(errno));
    }
    file_descriptor(file_descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
    file_descriptor& operator=(file_descriptor&&) = delete;
    ~file_descriptor() {
        if (value_ >= 0) ::close(value_);
    }

    int get() const { return value_; }

private:
    int value_;
};

// A file in memory: what a child reads and writes there cannot block it, as a full pipe could.
file_descriptor memory_file() { return file_descriptor(::memfd_create("varve-report", MFD_CLOEXEC)); }

void write_all(file_descriptor const& file, std::string const& text) {
    for (std::size_t done = 0; done < text.size();) {
        auto const written = ::write(file.get(), text.data() + done, text.size() - done);
        if (written < 0 && errno != EINTR) throw std::runtime_error("cannot hand gnuplot its script: " + std::system_category().message(errno));
        done += written > 0 ? static_cast<std::size_t>(written) : 0;
    }
    ::lseek(file.get(), 0, SEEK_SET);
}

std::string read_all(file_descriptor const& file) {
    std::string text;
    std::array<char, 65536> buffer{};
    ::off_t offset = 0;
    for (;;) {
        auto const got = ::pread(file.get(), buffer.data(), buffer.size(), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return text;
        text.append(buffer.data(), static_cast<std::size_t>(got));
        offset += got;
    }
}

}  // namespace

std::optional<std::filesystem::path> find_gnuplot() {
    auto const* path = std::getenv("PATH");
    std::string const folders = path != nullptr ? path : "/usr/local/bin:/usr/bin:/bin";
    for (std::size_t begin = 0; begin <= folders.size();) {
        auto const end = std::min(folders.find(':', begin), folders.size());
        auto const program = std::filesystem::path(folders.substr(begin, end - begin)) / "gnuplot";
        std::error_code error;
        if (program.is_absolute() && std::filesystem::is_regular_file(program, error) && ::access(program.c_str(), X_OK) == 0) return program;
        begin = end + 1;
    }
    return std::nullopt;
}

std::string gnuplot_string(std::string const& text) {
    // Single quotes keep gnuplot from reading anything inside; these are left out all the same.
    std::string quoted = "'";
    for (auto const c : plain_text(text)) quoted += std::string_view("'\"`@\\$").find(c) == std::string_view::npos ? c : '?';
    return quoted + "'";
}

std::string run_gnuplot(std::filesystem::path const& gnuplot, std::string const& script) {
    auto const input = memory_file(), output = memory_file(), errors = memory_file();
    write_all(input, script);

    ::posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, input.get(), 0);
    ::posix_spawn_file_actions_adddup2(&actions, output.get(), 1);
    ::posix_spawn_file_actions_adddup2(&actions, errors.get(), 2);
    std::string program = gnuplot.string(), defaults = "-d";  // no ~/.gnuplot
    std::array<char*, 3> arguments{program.data(), defaults.data(), nullptr};
    ::pid_t child = 0;
    auto const failure = ::posix_spawn(&child, program.c_str(), &actions, nullptr, arguments.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    if (failure != 0) throw std::runtime_error("cannot start " + program + ": " + std::system_category().message(failure));
    int status = 0;
    while (::waitpid(child, &status, 0) < 0)
        if (errno != EINTR) throw std::runtime_error("cannot wait for " + program + ": " + std::system_category().message(errno));

    auto svg = read_all(output);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || svg.find("</svg>") == std::string::npos)
        throw std::runtime_error(program + " draws no SVG: " + plain_text(read_all(errors)).substr(0, 200));
    return svg;
}

}  // namespace varve::tool::reporting
