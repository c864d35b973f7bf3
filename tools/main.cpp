#include <fcntl.h>
#include <algorithm>
#include <exception>
#include <filesystem>
#include <iostream>
#include <new>
#include <string>
#include <vector>

#include "varve/detail/text.hpp"
#include "varve/version.hpp"

#include "bench_child.hpp"
#include "build_config.hpp"
#include "commands.hpp"
#include "commit.hpp"
#include "errors.hpp"

namespace varve::tool {

namespace {

struct command {
    char const* name;
    char const* summary;  ///< nullptr: not for users
    int (*run)(std::vector<std::string> const&, std::ostream&, std::ostream&);
};

constexpr command commands[] = {
    {"bench", "train the guide's transformer with each method and compare", bench},
    {"train", "train with one method; killed at any moment and started again, it goes on", train},
    {"monitor", "own stores for trainers, and outlive them", monitor},
    {"report", "write a report on results of bench", report},
    {"probe", "measure what a folder can take", probe},
    {"ls", "list the checkpoints of a store", ls},
    {"inspect", "show what is in a checkpoint", inspect},
    {"verify", "check every byte of a checkpoint or of a store", verify},
    {"diff", "compare two checkpoints bit for bit", diff},
    {"restore", "write a checkpoint out as a file of its own", restore},
    {"bench-run", nullptr, bench_run},
};

void help(std::ostream& out) {
    out << "Usage: varve COMMAND [options]\n\nSaves the state of a training run often, without slowing it down, and compares ways to do "
           "so.\n\nCommands:\n";
    for (auto const& c : commands)
        if (c.summary) out << "  " << c.name << std::string(10 - std::string(c.name).size(), ' ') << c.summary << '\n';
    out << "\nvarve COMMAND --help tells more. varve --version says what is built in.\n";
}

void version(std::ostream& out) {
    std::string backends;
    auto add = [&](bool built, char const* name) {
        if (built) backends += (backends.empty() ? "" : " ") + std::string(name);
    };
    add(VARVE_TOOL_WITH_POSIX, "posix");
    add(VARVE_TOOL_WITH_URING, "io_uring");
    add(VARVE_TOOL_WITH_ASIO, "asio");
    add(VARVE_TOOL_WITH_CUDA_RUNTIME, "cuda");
    add(VARVE_TOOL_WITH_GDS, "gds");
    add(VARVE_TOOL_WITH_TORCH, "torch");
    auto or_none = [](std::string text) { return text.empty() ? std::string("none") : text; };
    out << "varve " VARVE_VERSION "\ncommit: " << commit << "\nbackends: " << or_none(backends)
        << "\nLibTorch: " << or_none(VARVE_TOOL_LIBTORCH_VERSION) << "\nCUDA: " << or_none(VARVE_TOOL_LIBTORCH_CUDA) << '\n';
}

int dispatch(std::vector<std::string> const& args) {
    if (args.empty()) throw usage_error("no command given; varve --help lists them");
    if (args[0] == "--help" || args[0] == "-h" || args[0] == "help") return help(std::cout), 0;
    if (args[0] == "--version") return version(std::cout), 0;
    for (auto const& c : commands)
        if (args[0] == c.name) {
            std::vector<std::string> rest(args.begin() + 1, args.end());
            std::replace(rest.begin(), rest.end(), std::string("-h"), std::string("--help"));
            return c.run(rest, std::cout, std::cerr);
        }
    throw usage_error("unknown command '" + args[0] + "'; varve --help lists them");
}

/// One line, whatever is in a name or a library put into its message: LibTorch's backtrace goes, other control characters are shown.
std::string one_line(std::string text) {
    for (char const* trace : {"\nException raised from", "\nframe #"}) text.resize(std::min(text.size(), text.find(trace)));
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return detail::printable(text);
}

int run(std::vector<std::string> const& args) {
    auto const prefix = "varve" + (args.empty() || args[0].starts_with('-') ? "" : " " + one_line(args[0] == "bench-run" ? "bench" : args[0])) + ": ";
    auto say = [&](std::string const& text, int code) {
        std::cout.flush();
        std::cerr << prefix << one_line(text) << std::endl;
        return code;
    };
    try {
        int const code = dispatch(args);
        std::cout.flush();
        if (!std::cout) return say("cannot write to standard output", 1);
        return code;
    } catch (usage_error const& e) {
        return say(e.what(), 2);
    } catch (interrupted const& e) {
        return say(e.what(), 130);
    } catch (std::filesystem::filesystem_error const& e) {
        return say(e.path1().string() + ": " + e.code().message(), 1);
    } catch (std::bad_alloc const&) {
        return say("out of memory; take a smaller model or a smaller --pool-size-mb", 1);
    } catch (std::exception const& e) {
        return say(e.what(), 1);
    }
}

}  // namespace

}  // namespace varve::tool

int main(int argc, char** argv) {
    // A file that were opened in the place of a closed standard one would get what is printed.
    for (int fd : {0, 1, 2})
        if (::fcntl(fd, F_GETFD) < 0) ::open("/dev/null", O_RDWR);
    return varve::tool::run({argv + 1, argv + argc});
}
