#include <boost/test/unit_test.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <thread>

#include "comes_to.hpp"
#include "free_port.hpp"
#include "monitored_runs.hpp"

namespace varve_test {

namespace {

/// This host's monitor, and its peer: another process in another folder, over loopback TCP.
struct two_hosts {
    two_hosts() { start_there(); }

    void start_there() {
        there = std::make_unique<running_tool>(
            std::vector<std::string>{"monitor", "--dir", w.folder / "there", "--tcp", "127.0.0.1:" + port, "--linger", "1"});
        BOOST_TEST_REQUIRE(answers({"--tcp", "127.0.0.1:" + port}));
    }
    void start_here() {
        here = std::make_unique<running_tool>(
            std::vector<std::string>{"monitor", "--dir", w.folder / "here", "--unix", socket, "--peer", "127.0.0.1:" + port, "--linger", "1"});
        BOOST_TEST_REQUIRE(answers({"--unix", socket}));
    }
    static void kill(std::unique_ptr<running_tool>& monitor) {
        monitor->signal(SIGKILL);
        monitor->wait();
        monitor.reset();
    }
    static void end(std::unique_ptr<running_tool>& monitor) {
        monitor->signal(SIGTERM);
        BOOST_TEST_REQUIRE(monitor->ends_within(20s));
        auto const ended = monitor->wait();
        BOOST_TEST(ended.code == 0, ended.err);
        monitor.reset();
    }
    static nlohmann::json status(std::vector<std::string> const& at) {
        auto const r = run_tool(joined({"monitor", "--status", "--json"}, at));
        return r.code == 0 ? nlohmann::json::parse(r.out) : nlohmann::json{};
    }
    /// What this host's monitor says of the copy.
    nlohmann::json copy() const {
        auto const s = status({"--unix", socket});
        return s.contains("peer") && !s["peer"]["stores"].empty() ? s["peer"]["stores"][0] : nlohmann::json::object();
    }
    std::uint64_t durable_there() const { return copy().value("durable_step", std::uint64_t{0}); }
    bool copy_reaches(std::uint64_t step, std::chrono::seconds limit = 30s) const {
        return comes_to([&] { return durable_there() >= step; }, limit);
    }
    bool there_is_idle() const {
        return comes_to([&] {
            auto const s = status({"--tcp", "127.0.0.1:" + port});
            return s.contains("stores") && s["stores"].empty();
        });
    }
    /// Every file that carries a checkpoint's name is whole there.
    void nothing_is_broken_there() const { expect_whole(w.folder / "there/run"); }
    std::vector<std::string> train(std::uint64_t steps) const { return w.train("here/run", steps, {"--monitor", "unix:" + socket}); }
    void host_is_lost() const {
        fs::remove_all(w.folder / "here");
        fs::create_directory(w.folder / "here");
    }

    workplace w;
    std::string const port = std::to_string(free_port()), socket = w.folder / "s";
    std::unique_ptr<running_tool> here, there;
};

}  // namespace

BOOST_AUTO_TEST_CASE(a_run_ends_with_the_same_checkpoint_on_both_hosts) {
    if (!have_monitor()) return;
    two_hosts hosts;
    hosts.host_is_lost();
    hosts.start_here();
    trains(hosts.train(12));
    BOOST_TEST(hosts.copy_reaches(12));
    same_bits(hosts.w, "here/run", "there/run");
    two_hosts::end(hosts.here);
    // The same with a monitor that the run starts by itself, which does not end before the peer has the newest.
    trains(hosts.w.train("here/run", 20, {"--use-monitor", "--peer", "127.0.0.1:" + hosts.port}));
    BOOST_TEST(hosts.there_is_idle());
    BOOST_TEST(stored_steps(hosts.w.folder / "there/run").back() == 20u);
    same_bits(hosts.w, "here/run", "there/run");
    two_hosts::end(hosts.there);
    BOOST_TEST(hosts.w.monitors().empty());
}

BOOST_AUTO_TEST_CASE(a_peer_that_is_killed_disturbs_no_run_and_catches_up) {
    if (!have_monitor()) return;
    two_hosts hosts;
    hosts.host_is_lost();
    hosts.start_here();
    std::mt19937 random(std::random_device{}());
    running_tool run(hosts.train(1'000'000));
    for (int round = 0; round < (full() ? 20 : 4); ++round) {
        BOOST_TEST_REQUIRE(hosts.copy_reaches(hosts.durable_there() + 2), "in round " << round);
        std::this_thread::sleep_for(std::chrono::milliseconds(std::uniform_int_distribution<>(0, 100)(random)));
        auto const promised = hosts.durable_there();
        two_hosts::kill(hosts.there);
        hosts.nothing_is_broken_there();
        BOOST_TEST(stored_steps(hosts.w.folder / "there/run").back() >= promised);
        // The run goes on: its saves become durable as before, none fails.
        auto const at = hosts.w.events_size("here/run");
        BOOST_TEST(hosts.w.comes("here/run", "durable", at, 3));
        auto const step = largest(hosts.w.steps("here/run", "durable"));
        hosts.start_there();
        BOOST_TEST_REQUIRE(hosts.copy_reaches(step));
    }
    BOOST_TEST(hosts.w.steps("here/run", "failed").empty());
    run.signal(SIGINT);
    BOOST_TEST(run.ends_within(20s));
    run.wait();
    BOOST_TEST(hosts.copy_reaches(stored_steps(hosts.w.folder / "here/run").back()));
    same_bits(hosts.w, "here/run", "there/run");
    two_hosts::end(hosts.here);
    two_hosts::end(hosts.there);
    BOOST_TEST(hosts.w.monitors().empty());
}

BOOST_AUTO_TEST_CASE(with_its_host_lost_a_run_goes_on_from_the_peer_with_equal_losses) {
    if (!have_monitor()) return;
    two_hosts hosts;
    std::mt19937 random(std::random_device{}());
    hosts.host_is_lost();
    std::uint64_t promised = 0;
    int const rounds = full() ? 20 : 5;
    for (int round = 0; round < rounds; ++round) {
        hosts.start_here();
        auto const from = hosts.w.events_size("here/run");
        running_tool run(hosts.train(1'000'000));
        // The peer may have been ahead of what was promised: its word alone does not tell that this run has trained.
        BOOST_TEST_REQUIRE(hosts.w.comes("here/run", "durable", from, 1), "in round " << round);
        BOOST_TEST_REQUIRE(hosts.copy_reaches(promised + 1), "in round " << round);
        if (round > 0) {
            auto const restored = hosts.w.steps("here/run", "restored", from);
            BOOST_TEST_REQUIRE(restored.size() == 1u);
            BOOST_TEST(restored.front() >= promised, "the peer had step " << promised << ", and the run went on from " << restored.front());
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(std::uniform_int_distribution<>(0, 150)(random)));
        promised = hosts.durable_there();
        // The host dies: its trainer, its monitor, its disk.
        hosts.here->signal(SIGKILL);
        run.signal(SIGKILL);
        run.wait();
        two_hosts::kill(hosts.here);
        auto const before = fs::exists(hosts.w.folder / "here/run.events") ? hosts.w.folder / "events" : "";
        BOOST_TEST_REQUIRE(!before.empty());
        fs::copy_file(hosts.w.folder / "here/run.events", before, fs::copy_options::overwrite_existing);
        hosts.host_is_lost();
        fs::copy_file(before, hosts.w.folder / "here/run.events");
        BOOST_TEST_REQUIRE(hosts.there_is_idle());
        hosts.nothing_is_broken_there();
        BOOST_TEST(stored_steps(hosts.w.folder / "there/run").back() >= promised);
    }
    hosts.start_here();
    auto const last = stored_steps(hosts.w.folder / "there/run").back() + 10;
    trains(hosts.train(last));
    BOOST_TEST(hosts.copy_reaches(last));
    trains(hosts.w.train("whole", last, {}));
    same_bits(hosts.w, "whole", "here/run");
    same_bits(hosts.w, "whole", "there/run");
    // A run that was killed may have been trained beyond where this one ends.
    auto losses = losses_in(hosts.w.folder / "here/run.events");
    losses.erase(losses.upper_bound(last), losses.end());
    BOOST_TEST((losses == losses_in(hosts.w.folder / "whole.events")));
    two_hosts::end(hosts.here);
    two_hosts::end(hosts.there);
    BOOST_TEST(hosts.w.monitors().empty());
}

}  // namespace varve_test
