#pragma once

#include <boost/test/unit_test.hpp>

#include <sys/stat.h>
#include <unistd.h>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "comes_to.hpp"
#include "support.hpp"
#include "tool.hpp"

/// Runs through monitors: what their end-to-end tests share.
namespace varve_test {

using namespace std::chrono_literals;
namespace fs = std::filesystem;

inline bool have_monitor() {
    if (run_tool({"monitor", "--help"}).code == 0) return true;
    skip("the monitor is not built");
    return false;
}

/// A model whose step takes a few milliseconds, and a folder for the monitors that runs start.
struct workplace {
    workplace() {
        fs::create_directory(folder.path() / "sockets");
        ::chmod((folder.path() / "sockets").c_str(), 0700);
        ::setenv("XDG_RUNTIME_DIR", (folder / "sockets").c_str(), 1);
    }
    ~workplace() {
        for (auto pid : monitors()) ::kill(pid, SIGKILL);
        ::unsetenv("XDG_RUNTIME_DIR");
    }

    std::vector<std::string> train(std::string const& store, std::uint64_t steps, std::vector<std::string> const& more) const {
        return every_step_run(folder / store, folder / (store + ".events"), steps, more, method);
    }

    /// Processes `varve monitor` that have to do with this folder.
    std::vector<pid_t> monitors() const {
        std::vector<pid_t> out;
        for (auto const& entry : fs::directory_iterator("/proc")) {
            auto const pid = std::atoi(entry.path().filename().c_str());
            if (pid <= 0) continue;
            std::ifstream in(entry.path() / "cmdline", std::ios::binary);
            std::string const args{std::istreambuf_iterator<char>(in), {}};
            if (args.find(std::string("\0monitor\0", 9)) != std::string::npos && args.find(folder.path().string()) != std::string::npos)
                out.push_back(pid);
        }
        return out;
    }
    bool no_monitor_within(std::chrono::milliseconds limit) const {
        return comes_to([&] { return monitors().empty(); }, limit);
    }
    /// What the events file says since it was `from` bytes long.
    std::vector<std::uint64_t> steps(std::string const& store, std::string const& event, std::uintmax_t from = 0) const {
        return steps_of(folder / (store + ".events"), event, from);
    }
    std::uintmax_t events_size(std::string const& store) const {
        std::error_code none;
        auto const size = fs::file_size(folder / (store + ".events"), none);
        return none ? 0 : size;
    }
    bool comes(std::string const& store, std::string const& event, std::uintmax_t from, std::size_t count,
               std::chrono::milliseconds limit = 120s) const {
        return comes_to([&] { return steps(store, event, from).size() >= count; }, limit, 2ms);
    }

    temporary_folder folder;
    std::string method = "layerwise";
};

inline void trains(std::vector<std::string> const& args) {
    auto const r = run_tool(args);
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
}

/// Whether a monitor comes to answer there.
inline bool answers(std::vector<std::string> const& at) {
    return comes_to([&] { return run_tool(joined({"monitor", "--status"}, at)).code == 0; });
}

/// What the two runs' newest checkpoints hold is the same, bit for bit, and each store is whole.
inline void same_bits(workplace const& w, std::string const& a, std::string const& b) {
    auto const compared = run_tool({"diff", newest_file(w.folder / a), newest_file(w.folder / b)});
    BOOST_TEST(compared.code == 0, compared.out << compared.err);
    expect_whole(w.folder / b);
}

}  // namespace varve_test
