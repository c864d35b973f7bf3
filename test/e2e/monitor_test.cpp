#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <iterator>
#include <netinet/in.h>
#include <random>
#include <sstream>
#include <sys/socket.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

using namespace std::chrono_literals;
namespace fs = std::filesystem;

bool have_monitor() {
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
        return joined({"train", "--method", "layerwise", "--dir", folder / store, "--events", folder / (store + ".events"), "--num-steps", std::to_string(steps),
                       "--d-model", "32", "--num-layers", "2", "--nhead", "4", "--vocab-size", "2000", "--dim-feedforward", "64", "--num-samples", "64",
                       "--seq-len", "16", "--batch-size", "2", "--checkpoint-freq", "1"},
                      more);
    }

    /// Processes `varve monitor` that have to do with this folder.
    std::vector<pid_t> monitors() const {
        std::vector<pid_t> out;
        for (auto const& entry : fs::directory_iterator("/proc")) {
            auto const pid = std::atoi(entry.path().filename().c_str());
            if (pid <= 0) continue;
            std::ifstream in(entry.path() / "cmdline", std::ios::binary);
            std::string const args{std::istreambuf_iterator<char>(in), {}};
            if (args.find(std::string("\0monitor\0", 9)) != std::string::npos && args.find(folder.path().string()) != std::string::npos) out.push_back(pid);
        }
        return out;
    }
    bool no_monitor_within(std::chrono::milliseconds limit) const {
        for (auto const until = std::chrono::steady_clock::now() + limit; std::chrono::steady_clock::now() < until; std::this_thread::sleep_for(10ms))
            if (monitors().empty()) return true;
        return false;
    }
    /// What the events file says since it was `from` bytes long: steps of that event, whole lines alone.
    std::vector<std::uint64_t> steps(std::string const& store, std::string const& event, std::uintmax_t from = 0) const {
        std::ifstream in(folder / (store + ".events"), std::ios::binary);
        in.seekg(static_cast<std::streamoff>(from));
        std::vector<std::uint64_t> out;
        for (std::string line; std::getline(in, line) && !in.eof();) {
            auto const e = nlohmann::json::parse(line);
            if (e.at("event") == event) out.push_back(e.at("step"));
        }
        return out;
    }
    std::uintmax_t events_size(std::string const& store) const {
        std::error_code none;
        auto const size = fs::file_size(folder / (store + ".events"), none);
        return none ? 0 : size;
    }
    bool comes(std::string const& store, std::string const& event, std::uintmax_t from, std::size_t count, std::chrono::milliseconds limit = 30s) const {
        for (auto const until = std::chrono::steady_clock::now() + limit; std::chrono::steady_clock::now() < until; std::this_thread::sleep_for(2ms))
            if (steps(store, event, from).size() >= count) return true;
        return false;
    }

    temporary_folder folder;
};

std::uint64_t largest(std::vector<std::uint64_t> const& steps) { return steps.empty() ? 0 : *std::max_element(steps.begin(), steps.end()); }

void trains(std::vector<std::string> const& args) {
    auto const r = run_tool(args);
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
}

/// A port of the loopback that nobody has at the moment.
std::string free_port() {
    int const fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    BOOST_TEST_REQUIRE(::bind(fd, reinterpret_cast<sockaddr*>(&at), size) == 0);
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size);
    ::close(fd);
    return std::to_string(ntohs(at.sin_port));
}

/// What the two runs' newest checkpoints hold is the same, bit for bit, and each store is whole.
void same_bits(workplace const& w, std::string const& a, std::string const& b) {
    auto const compared = run_tool({"diff", newest_file(w.folder / a), newest_file(w.folder / b)});
    BOOST_TEST(compared.code == 0, compared.out << compared.err);
    auto const whole = run_tool({"verify", w.folder / b});
    BOOST_TEST(whole.code == 0, whole.out << whole.err);
}

enum class victim { trainer, monitor, both };

/// Kills one or both at a random moment, round after round; each time what was promised is there when the run goes on.
/// `over`: what train is told, and how a monitor is there again where it does not start one itself.
void kill_and_go_on(workplace& w, int rounds, std::vector<std::string> const& over, std::function<void()> monitor_again) {
    bool const over_starts_one = over.front() == "--use-monitor";
    std::mt19937 random(std::random_device{}());
    auto some_time = [&] { return std::chrono::milliseconds(std::uniform_int_distribution<>(0, full() ? 400 : 150)(random)); };
    std::uint64_t promised = 0;
    for (int round = 0; round < rounds; ++round) {
        auto const kind = static_cast<victim>(round % 3);
        auto const from = w.events_size("killed");
        auto more = over;
        if (round % 2 == 1) more = joined(more, {"--when-busy", "replace"});
        monitor_again();
        running_tool run(w.train("killed", 1'000'000, more));
        BOOST_TEST_REQUIRE(w.comes("killed", "durable", from, 1), "in round " << round);
        // It went on from at least what the last one was told is safe.
        if (promised > 0) {
            auto const restored = w.steps("killed", "restored", from);
            BOOST_TEST_REQUIRE(restored.size() == 1u);
            BOOST_TEST(restored.front() >= promised, "promised step " << promised << " and went on from " << restored.front());
        }
        std::this_thread::sleep_for(some_time());
        // Before a trainer whose monitor is dead can start another.
        if (kind == victim::both) run.signal(SIGKILL);
        if (kind != victim::trainer)
            for (auto pid : w.monitors()) ::kill(pid, SIGKILL);
        if (kind == victim::both || (kind == victim::monitor && !over_starts_one)) BOOST_TEST_REQUIRE(w.no_monitor_within(5s));
        if (kind == victim::monitor) {
            // The trainer goes on, with another monitor.
            auto const killed_at = w.events_size("killed");
            monitor_again();
            BOOST_TEST_REQUIRE(w.comes("killed", "durable", killed_at, 2));
            BOOST_TEST(!run.ends_within(0ms));
        }
        run.signal(SIGKILL);
        run.wait();
        promised = largest(w.steps("killed", "durable"));
        if (kind == victim::trainer) promised = std::max(promised, largest(w.steps("killed", "crash_safe", from)));
    }
    auto const last = promised + 20;
    monitor_again();
    trains(w.train("killed", last, over));
    trains(w.train("whole", last, {}));
    same_bits(w, "whole", "killed");
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_run_through_a_monitor_ends_with_the_bits_of_one_without) {
    if (!have_monitor()) return;
    workplace w;
    trains(w.train("without", 12, {}));
    trains(w.train("with", 6, {"--use-monitor"}));
    trains(w.train("with", 12, {"--use-monitor"}));
    same_bits(w, "without", "with");
    BOOST_TEST(w.monitors().empty());
    BOOST_TEST(fs::is_empty(w.folder.path() / "sockets"));
    // Every save is told to be crash-safe before it is told to be durable.
    BOOST_TEST(w.steps("with", "crash_safe") == w.steps("with", "durable"), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(kills_of_trainer_and_monitor_lose_nothing_on_a_unix_socket) {
    if (!have_monitor()) return;
    workplace w;
    kill_and_go_on(w, full() ? 100 : 10, {"--use-monitor", "--linger", "1"}, [] {});
    BOOST_TEST(w.no_monitor_within(20s));
    BOOST_TEST(fs::is_empty(w.folder.path() / "sockets"));
}

BOOST_AUTO_TEST_CASE(kills_of_trainer_and_monitor_lose_nothing_over_tcp) {
    if (!have_monitor()) return;
    workplace w;
    auto const port = free_port();
    std::unique_ptr<running_tool> monitor;
    auto monitor_again = [&] {
        if (monitor && !w.monitors().empty()) return;
        monitor = std::make_unique<running_tool>(std::vector<std::string>{"monitor", "--dir", w.folder.path().string(), "--tcp", "127.0.0.1:" + port, "--linger", "2"});
        for (int i = 0; i < 500 && run_tool({"monitor", "--status", "--tcp", "127.0.0.1:" + port}).code != 0; ++i) std::this_thread::sleep_for(10ms);
    };
    kill_and_go_on(w, full() ? 100 : 10, {"--monitor", "tcp:127.0.0.1:" + port}, monitor_again);
    monitor->signal(SIGTERM);
    BOOST_TEST(monitor->ends_within(10s));
    auto const ended = monitor->wait();
    BOOST_TEST(ended.code == 0, ended.err);
}

BOOST_AUTO_TEST_CASE(a_killed_run_goes_on_from_the_memory_of_its_lingering_monitor) {
    if (!have_monitor()) return;
    workplace w;
    std::uint64_t promised = 0;
    {
        running_tool run(w.train("run", 1'000'000, {"--use-monitor", "--linger", "20"}));
        BOOST_TEST_REQUIRE(w.comes("run", "crash_safe", 0, 3));
        run.signal(SIGKILL);
        run.wait();
        promised = largest(w.steps("run", "crash_safe"));
    }
    BOOST_TEST(w.monitors().size() == 1u);
    auto const r = run_tool(w.train("run", promised + 5, {"--use-monitor"}));
    BOOST_TEST(r.code == 0, r.err);
    BOOST_TEST(r.err.find("the monitor's memory") != std::string::npos, r.err);
    BOOST_TEST(largest(w.steps("run", "restored")) >= promised);
    BOOST_TEST(w.no_monitor_within(20s));
    BOOST_TEST(fs::is_empty(w.folder.path() / "sockets"));
}

BOOST_AUTO_TEST_CASE(several_trainers_share_a_monitor_and_its_status_tells_of_them) {
    if (!have_monitor()) return;
    workplace w;
    auto const socket = w.folder / "s";
    running_tool monitor({"monitor", "--dir", w.folder.path().string(), "--unix", socket});
    for (int i = 0; i < 500 && !fs::exists(socket); ++i) std::this_thread::sleep_for(10ms);
    running_tool one(w.train("one", 1'000'000, {"--monitor", "unix:" + socket})), two(w.train("two", 1'000'000, {"--monitor", "unix:" + socket}));
    BOOST_TEST_REQUIRE(w.comes("one", "durable", 0, 3));
    BOOST_TEST_REQUIRE(w.comes("two", "durable", 0, 3));
    auto const second = run_tool(w.train("one", 1'000'000, {"--monitor", "unix:" + socket}));
    BOOST_TEST(second.code == 1);
    BOOST_TEST(second.err.find("another process is writing to this store") != std::string::npos, second.err);
    BOOST_TEST(line_count(second.err) == 1u, second.err);
    auto const status = nlohmann::json::parse(run_tool({"monitor", "--status", "--json", "--unix", socket}).out);
    BOOST_TEST(status["stores"].size() == 2u);
    for (auto const& s : status["stores"]) BOOST_TEST(s["durable_step"].get<int>() > 0);
    // SIGTERM: whatever is crash-safe is committed, the socket goes, the trainers go on and fail their saves.
    auto const promised = largest(w.steps("one", "crash_safe"));
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
    BOOST_TEST(monitor.wait().code == 0);
    BOOST_TEST(!fs::exists(socket));
    BOOST_TEST(stored_steps(w.folder / "one").back() >= promised);
    BOOST_TEST(!one.ends_within(300ms));
    for (auto* run : {&one, &two}) {
        run->signal(SIGKILL);
        run->wait();
    }
}

}  // namespace varve_test
