#include <boost/test/unit_test.hpp>

#include <sys/socket.h>
#include <sys/un.h>
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>

#include "free_port.hpp"
#include "monitored_runs.hpp"

namespace varve_test {

namespace {

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

/// A run is killed, and the next one finds its newest checkpoint in its monitor's memory.
void goes_on_from_memory(std::string const& method) {
    if (!have_monitor()) return;
    workplace w;
    w.method = method;
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

/// The words behind `varve` in the ExecStart of the backend's README, with paths of our own.
std::vector<std::string> command_of_the_unit_file(std::map<std::string, std::string> const& ours) {
    auto const readme = read_text(fs::path(std::getenv("VARVE_SOURCE_ROOT")) / "backends/asio/README.md");
    std::string const begin = "ExecStart=/usr/bin/varve ";
    auto const at = readme.find(begin);
    BOOST_TEST_REQUIRE(at != std::string::npos);
    std::istringstream line(readme.substr(at + begin.size(), readme.find('\n', at) - at - begin.size()));
    std::vector<std::string> out;
    for (std::string word; line >> word;) out.push_back(ours.contains(word) ? ours.at(word) : word);
    for (auto const& [path, our_path] : ours) BOOST_TEST(std::ranges::count(out, our_path) == 1, path);
    return out;
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
    kill_and_go_on(w, full() ? 40 : 10, {"--use-monitor", "--linger", "1"}, [] {});
    BOOST_TEST(w.no_monitor_within(20s));
    BOOST_TEST(fs::is_empty(w.folder.path() / "sockets"));
}

BOOST_AUTO_TEST_CASE(kills_of_trainer_and_monitor_lose_nothing_over_tcp) {
    if (!have_monitor()) return;
    workplace w;
    auto const port = std::to_string(free_port());
    std::unique_ptr<running_tool> monitor;
    auto monitor_again = [&] {
        if (monitor && !w.monitors().empty()) return;
        monitor.reset();  // waits for its end, and its socket's
        monitor = std::make_unique<running_tool>(
            std::vector<std::string>{"monitor", "--dir", w.folder.path().string(), "--tcp", "127.0.0.1:" + port, "--linger", "2"});
        BOOST_TEST_REQUIRE(answers({"--tcp", "127.0.0.1:" + port}));
    };
    kill_and_go_on(w, full() ? 40 : 10, {"--monitor", "tcp:127.0.0.1:" + port}, monitor_again);
    monitor->signal(SIGTERM);
    BOOST_TEST(monitor->ends_within(10s));
    auto const ended = monitor->wait();
    BOOST_TEST(ended.code == 0, ended.err);
}

BOOST_AUTO_TEST_CASE(kills_of_trainer_and_monitor_lose_nothing_of_a_pool_in_gpu_memory) {
    if (!have_tool_gpu() || !have_monitor()) return;
    workplace w;
    w.method = "gds+layerwise+cufile";
    if (runnable({w.method}).empty()) return skip("cuFile is not built");
    kill_and_go_on(w, full() ? 40 : 10, {"--use-monitor", "--linger", "1"}, [] {});
    BOOST_TEST(w.no_monitor_within(20s));
    BOOST_TEST(fs::is_empty(w.folder.path() / "sockets"));
}

BOOST_AUTO_TEST_CASE(a_killed_run_goes_on_from_the_memory_of_its_lingering_monitor) { goes_on_from_memory("layerwise"); }
BOOST_AUTO_TEST_CASE(a_run_whose_pool_was_in_gpu_memory_goes_on_from_there_too) {
    if (!have_tool_gpu()) return;
    if (runnable({"gds+async+cufile"}).empty()) return skip("cuFile is not built");
    goes_on_from_memory("gds+async+cufile");
}

/// Trainers of two GPUs, as ranks have them, each with its pool in the memory of its own.
BOOST_AUTO_TEST_CASE(a_monitor_keeps_what_killed_trainers_had_in_the_memory_of_two_gpus) {
    if (!have_tool_gpu() || !have_monitor()) return;
    if (std::getenv("CUDA_VISIBLE_DEVICES")) return skip("CUDA_VISIBLE_DEVICES says which GPUs are ours");
    workplace w;
    w.method = "gds+async+cufile";
    auto on_gpu = [](char const* index) { ::setenv("CUDA_VISIBLE_DEVICES", index, 1); };
    auto on_all = [] { ::unsetenv("CUDA_VISIBLE_DEVICES"); };
    on_gpu("1");
    bool const two = !runnable({w.method}).empty();
    on_all();
    if (!two) return skip("one GPU here, or cuFile is not built");
    auto const socket = w.folder / "s";
    running_tool monitor({"monitor", "--dir", w.folder.path().string(), "--unix", socket, "--linger", "600"});
    BOOST_TEST_REQUIRE(answers({"--unix", socket}));
    auto go_on = [&](std::string const& store, char const* gpu, std::uint64_t steps) {
        on_gpu(gpu);
        auto run = std::make_unique<running_tool>(w.train(store, steps, {"--monitor", "unix:" + socket}));
        on_all();
        return run;
    };
    for (auto const& run : {go_on("one", "0", 1'000'000), go_on("two", "1", 1'000'000)}) {
        for (auto const* store : {"one", "two"}) BOOST_TEST_REQUIRE(w.comes(store, "crash_safe", 0, 5));
        run->signal(SIGKILL);
    }
    for (auto const& [store, gpu] : {std::pair("one", "1"), std::pair("two", "0")}) {
        auto const promised = largest(w.steps(store, "crash_safe"));
        auto const r = go_on(store, gpu, promised + 5)->wait();
        BOOST_TEST(r.code == 0, r.err);
        BOOST_TEST(r.err.find("the monitor's memory") != std::string::npos, r.err);
        BOOST_TEST(largest(w.steps(store, "restored")) >= promised);
        trains(w.train(store + std::string("-whole"), promised + 5, {}));
        same_bits(w, store + std::string("-whole"), store);
    }
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
}

BOOST_AUTO_TEST_CASE(what_waits_for_the_disk_is_there_when_the_run_ends_or_is_killed) {
    if (!have_monitor()) return;
    workplace w;
    std::vector<std::string> const paced{"--use-monitor", "--linger", "1", "--when-busy", "replace", "--durable-interval", "1000"};
    trains(w.train("killed", 30, paced));
    auto const safe = w.steps("killed", "crash_safe"), durable = w.steps("killed", "durable");
    BOOST_TEST(largest(durable) == 30u);
    BOOST_TEST(safe.size() > durable.size());
    auto const from = w.events_size("killed");
    {
        running_tool run(w.train("killed", 1'000'000, paced));
        BOOST_TEST_REQUIRE(w.comes("killed", "crash_safe", from, 20));
        run.signal(SIGKILL);
        run.wait();
    }
    BOOST_TEST(w.no_monitor_within(20s));
    auto const promised = largest(w.steps("killed", "crash_safe", from));
    BOOST_TEST(stored_steps(w.folder / "killed").back() >= promised);
    trains(w.train("killed", promised + 5, paced));
    trains(w.train("whole", promised + 5, {}));
    same_bits(w, "whole", "killed");
}

BOOST_AUTO_TEST_CASE(an_interval_that_the_pool_has_no_room_for_is_refused) {
    if (!have_monitor()) return;
    workplace w;
    auto const since = std::chrono::steady_clock::now();
    auto const r = run_tool(w.train("run", 10, {"--use-monitor", "--when-busy", "replace", "--durable-interval", "5", "--pool-size-mb", "1"}));
    BOOST_TEST((std::chrono::steady_clock::now() - since < 45s));  // a monitor waits longer than that for its first trainer
    BOOST_TEST(r.code == 2, r.err);
    BOOST_TEST(r.err.find("three checkpoints in the pool, --pool-size-mb") != std::string::npos, r.err);
    BOOST_TEST(w.no_monitor_within(20s));
}

BOOST_AUTO_TEST_CASE(a_trainer_whose_monitor_dies_says_so_and_which_one_serves_now) {
    if (!have_monitor()) return;
    workplace w;
    running_tool run(w.train("run", 1'000'000, {"--use-monitor"}));
    BOOST_TEST_REQUIRE(w.comes("run", "durable", 0, 1));
    auto const first = w.monitors();
    BOOST_TEST_REQUIRE(first.size() == 1u);
    auto const killed_at = w.events_size("run");
    ::kill(first.front(), SIGKILL);
    BOOST_TEST_REQUIRE(w.comes("run", "durable", killed_at, 3));
    auto const second = w.monitors();
    BOOST_TEST_REQUIRE(second.size() == 1u);
    run.signal(SIGINT);
    BOOST_TEST(run.ends_within(60s));
    auto const ended = run.wait();
    BOOST_TEST(ended.code == 130);
    for (auto pid : {first.front(), second.front()})
        BOOST_TEST(ended.err.find("monitor started, process " + std::to_string(pid)) != std::string::npos, ended.err);
    BOOST_TEST(ended.err.find("the monitor, process " + std::to_string(first.front()) + ", is lost") != std::string::npos, ended.err);
}

BOOST_AUTO_TEST_CASE(training_goes_on_beside_a_monitor_that_is_stopped_and_is_saved_again_when_that_goes_on) {
    if (!have_monitor()) return;
    workplace w;
    auto const socket = w.folder / "s";
    running_tool monitor({"monitor", "--dir", w.folder.path().string(), "--unix", socket});
    BOOST_TEST_REQUIRE(answers({"--unix", socket}));
    running_tool run(w.train("run", 1'000'000, {"--monitor", "unix:" + socket}));
    BOOST_TEST_REQUIRE(w.comes("run", "durable", 0, 1));
    monitor.signal(SIGSTOP);
    std::this_thread::sleep_for(3s);  // training waits for blocks by then
    // What says nothing for 15 s is lost.
    auto const waits_at = w.events_size("run");
    BOOST_TEST(w.comes("run", "step", waits_at, 20, 60s));
    auto const goes_on_at = w.events_size("run");
    monitor.signal(SIGCONT);
    BOOST_TEST(w.comes("run", "durable", goes_on_at, 3));
    run.signal(SIGINT);
    BOOST_TEST(run.ends_within(60s));
    auto const ended = run.wait();
    BOOST_TEST(ended.code == 130);
    BOOST_TEST(ended.err.find("is lost") != std::string::npos, ended.err);
    expect_whole(w.folder / "run");
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
}

BOOST_AUTO_TEST_CASE(a_service_manager_is_told_when_a_monitor_listens_and_when_it_ends) {
    if (!have_monitor()) return;
    workplace w;
    auto const notify = w.folder / "notify";
    int const manager = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    BOOST_TEST_REQUIRE(notify.size() < sizeof at.sun_path);
    notify.copy(at.sun_path, notify.size());
    BOOST_TEST_REQUIRE(::bind(manager, reinterpret_cast<sockaddr const*>(&at), sizeof at) == 0);
    timeval const limit{30, 0};
    ::setsockopt(manager, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    auto const told = [&] {
        std::string text(256, '\0');
        auto const size = ::recv(manager, text.data(), text.size(), 0);
        text.resize(size > 0 ? static_cast<std::size_t>(size) : 0);
        return text;
    };
    ::setenv("NOTIFY_SOCKET", notify.c_str(), 1);
    running_tool monitor(command_of_the_unit_file({{"/data/checkpoints", w.folder.path().string()}, {"/run/varve/socket", w.folder / "s"}}));
    ::unsetenv("NOTIFY_SOCKET");
    auto const ready = told();
    BOOST_TEST(ready.starts_with("READY=1\n"), ready);
    BOOST_TEST(run_tool({"monitor", "--status", "--unix", w.folder / "s"}).code == 0);
    monitor.signal(SIGTERM);
    BOOST_TEST(told() == "STOPPING=1");
    BOOST_TEST(monitor.ends_within(20s));
    BOOST_TEST(monitor.wait().code == 0);
    ::close(manager);
}

BOOST_AUTO_TEST_CASE(several_trainers_share_a_monitor_and_its_status_tells_of_them) {
    if (!have_monitor()) return;
    workplace w;
    auto const socket = w.folder / "s";
    running_tool monitor({"monitor", "--dir", w.folder.path().string(), "--unix", socket});
    BOOST_TEST_REQUIRE(answers({"--unix", socket}));
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
    auto const text = run_tool({"monitor", "--status", "--unix", socket}).out;
    for (std::string const words : {"one", "two", "in flight", "crash-safe step", "durable step", "GB/s", "in use"})
        BOOST_TEST(text.find(words) != std::string::npos, words << " in: " << text);
    // What becomes of one is nothing to the other.
    two.signal(SIGKILL);
    two.wait();
    auto const ones = w.events_size("one");
    BOOST_TEST(w.comes("one", "durable", ones, 3));
    auto const safe = largest(w.steps("two", "crash_safe"));
    BOOST_TEST(comes_to([&] { return stored_steps(w.folder / "two").back() >= safe; }));
    // SIGTERM: whatever is crash-safe is committed, the socket goes, the trainers go on and fail their saves.
    auto const promised = largest(w.steps("one", "crash_safe"));
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
    BOOST_TEST(monitor.wait().code == 0);
    BOOST_TEST(!fs::exists(socket));
    BOOST_TEST(stored_steps(w.folder / "one").back() >= promised);
    BOOST_TEST(!one.ends_within(300ms));
    one.signal(SIGKILL);
    one.wait();
    for (std::string const store : {"one", "two"}) {
        expect_whole(w.folder / store);
    }
}

}  // namespace varve_test
