#include <boost/test/unit_test.hpp>

#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "comes_to.hpp"
#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

using namespace std::chrono_literals;
namespace fs = std::filesystem;

bool shell(std::string const& command) { return std::system(("(" + command + ") > /dev/null 2>&1").c_str()) == 0; }

/// Two hosts and the cable between them: network namespaces with a pair of virtual interfaces. One that cannot be made skips the test.
class two_hosts {
public:
    two_hosts() : name_("varve" + std::to_string(::getpid())) { usable_ = set_up(); }
    ~two_hosts() {
        for (char side : {'a', 'b'}) shell("ip netns del " + host(side));
        if (!tool_.empty()) ::setenv("VARVE_TOOL", tool_.c_str(), 1);
    }
    two_hosts(two_hosts const&) = delete;
    two_hosts& operator=(two_hosts const&) = delete;

    bool usable() const { return usable_; }
    /// What is run from now on runs there: 'a', 'b', or ' ' for the machine itself.
    void at(char side) const { ::setenv("VARVE_TOOL", side == ' ' ? tool_.c_str() : (folder / (std::string("varve-") + side)).c_str(), 1); }
    void cable(bool in) const { BOOST_TEST_REQUIRE(shell("ip -n " + host('a') + " link set " + interface_ + (in ? " up" : " down"))); }
    std::vector<std::string> certificate(std::string const& name) const {
        return {"--cert", folder / (name + ".pem"), "--key", folder / (name + ".key"), "--ca", folder / "ca.pem"};
    }

    temporary_folder folder;

private:
    static bool skip_it(std::string const& why) {
        skip(why);
        return false;
    }

    bool set_up() {
        if (run_tool({"monitor", "--help"}).code != 0) return skip_it("the monitor is not built");
        if (!shell("openssl version")) return skip_it("the command openssl is not installed");
        if (!shell("ip netns add " + host('a')) || !shell("ip netns add " + host('b')))
            return skip_it("this machine does not let us make network namespaces");
        auto const cable = "v" + std::to_string(::getpid() % 100'000);
        if (!shell("ip link add " + cable + "a netns " + host('a') + " type veth peer name " + cable + "b netns " + host('b')))
            return skip_it("this machine does not let us make a pair of virtual interfaces");
        interface_ = cable + "a";
        for (char side : {'a', 'b'}) {
            auto const in = "ip -n " + host(side) + " ";
            if (!shell(in + "addr add 10.87.0." + (side == 'a' ? "1" : "2") + "/24 dev " + cable + side) ||
                !shell(in + "link set " + cable + side + " up") || !shell(in + "link set lo up"))
                return skip_it("this machine does not let us set up a network");
            // What runs the command there: `ip netns exec` becomes the command, so a signal to it is one to the command.
            auto const script = folder / (std::string("varve-") + side);
            std::ofstream(script) << "#!/bin/sh\nexec ip netns exec " << host(side) << " '" << std::getenv("VARVE_TOOL") << "' \"$@\"\n";
            ::chmod(script.c_str(), 0755);
        }
        tool_ = std::getenv("VARVE_TOOL");
        return make_certificates();
    }

    std::string host(char side) const { return name_ + side; }

    bool make_certificates() const {
        auto at_folder = [&](std::string const& name) { return folder / name; };
        std::string const key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes ";
        bool good = shell("openssl req -x509 " + key + "-days 2 -subj /CN=ca -keyout " + at_folder("ca.key") + " -out " + at_folder("ca.pem"));
        for (auto const& [name, address] : {std::pair("trainer", "10.87.0.1"), std::pair("monitor", "10.87.0.2")}) {
            std::ofstream(at_folder("ext")) << "subjectAltName=IP:" << address << "\n";
            good = good &&
                   shell("openssl req " + key + "-subj /CN=x -keyout " + at_folder(std::string(name) + ".key") + " -out " + at_folder("csr")) &&
                   shell("openssl x509 -req -in " + at_folder("csr") + " -CA " + at_folder("ca.pem") + " -CAkey " + at_folder("ca.key") +
                         " -CAcreateserial -days 2 -extfile " + at_folder("ext") + " -out " + at_folder(std::string(name) + ".pem"));
        }
        return good;
    }

    std::string name_, interface_, tool_;
    bool usable_ = false;
};

std::vector<std::string> train(two_hosts const& hosts, std::string const& store, std::uint64_t steps, std::vector<std::string> const& more) {
    return every_step_run(store, hosts.folder / "events", steps, more);
}

std::uint64_t newest(two_hosts const& hosts, std::string const& event) { return largest(steps_of(hosts.folder / "events", event)); }

bool passes(two_hosts const& hosts, std::string const& event, std::uint64_t step, std::chrono::seconds limit) {
    return comes_to([&] { return newest(hosts, event) > step; }, limit, 20ms);
}

}  // namespace

BOOST_AUTO_TEST_CASE(between_two_hosts_a_dropped_link_costs_no_durable_checkpoint) {
    two_hosts hosts;
    if (!hosts.usable()) return;
    auto const to = joined({"--monitor", "tcp:10.87.0.2:7000"}, hosts.certificate("trainer"));
    hosts.at('b');
    running_tool monitor(joined({"monitor", "--dir", hosts.folder / "stores", "--tcp", "10.87.0.2:7000"}, hosts.certificate("monitor")));
    hosts.at('a');
    auto const status = joined({"monitor", "--status", "--tcp", "10.87.0.2:7000"}, hosts.certificate("trainer"));
    comes_to([&] { return run_tool(status).code == 0; });

    std::uint64_t promised = 0;
    {
        running_tool run(train(hosts, "run", 1'000'000, to));
        BOOST_TEST_REQUIRE(passes(hosts, "durable", 3, 30s));
        hosts.cable(false);
        std::this_thread::sleep_for(500ms);
        promised = newest(hosts, "durable");
        auto const trained = newest(hosts, "step");
        // Nothing hangs past its timeout: the saves in flight fail, and training goes on without them.
        BOOST_TEST(passes(hosts, "failed", promised, 40s));
        BOOST_TEST(passes(hosts, "step", trained + 10, 40s));
        BOOST_TEST(!run.ends_within(0ms));
        BOOST_TEST(stored_steps(hosts.folder / "stores/run").back() >= promised);
        hosts.cable(true);
        auto const later = newest(hosts, "step");
        BOOST_TEST(passes(hosts, "durable", later, 60s));
        run.signal(SIGKILL);
        run.wait();
        promised = newest(hosts, "durable");
    }
    // It goes on from there, and ends with the bits of a run without monitor and network.
    auto const ended = run_tool(train(hosts, "run", promised + 10, to));
    BOOST_TEST(ended.code == 0, ended.err);
    BOOST_TEST(newest(hosts, "restored") >= promised);
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
    hosts.at(' ');
    auto const alone = run_tool(train(hosts, hosts.folder / "alone", promised + 10, {}));
    BOOST_TEST(alone.code == 0, alone.err);
    auto const compared = run_tool({"diff", newest_file(hosts.folder / "stores/run"), newest_file(hosts.folder / "alone")});
    BOOST_TEST(compared.code == 0, compared.out << compared.err);
}

BOOST_AUTO_TEST_CASE(a_dropped_link_to_the_peer_disturbs_no_run_and_a_lost_host_is_restored_from_it) {
    two_hosts hosts;
    if (!hosts.usable()) return;
    hosts.at('b');
    running_tool peer(joined({"monitor", "--dir", hosts.folder / "stores", "--tcp", "10.87.0.2:7000"}, hosts.certificate("monitor")));
    hosts.at('a');
    auto const socket = hosts.folder / "s";
    auto const local =
        joined({"monitor", "--dir", hosts.folder / "local", "--unix", socket, "--peer", "10.87.0.2:7000"}, hosts.certificate("trainer"));
    auto copy = [&] {
        auto const r = run_tool({"monitor", "--status", "--json", "--unix", socket});
        auto const s = r.code == 0 ? nlohmann::json::parse(r.out) : nlohmann::json{};
        return s.contains("peer") && !s["peer"]["stores"].empty() ? s["peer"]["stores"][0] : nlohmann::json::object();
    };
    auto copy_becomes = [&](auto says, std::chrono::seconds limit) { return comes_to([&] { return says(copy()); }, limit, 20ms); };
    auto const reaches = [](std::uint64_t step) { return [step](auto const& c) { return c.value("durable_step", std::uint64_t{0}) >= step; }; };
    auto const to = std::vector<std::string>{"--monitor", "unix:" + socket};
    std::uint64_t promised = 0;
    {
        running_tool monitor(local);
        comes_to([&] { return std::filesystem::exists(socket); });
        running_tool run(train(hosts, hosts.folder / "local/run", 1'000'000, to));
        BOOST_TEST_REQUIRE(copy_becomes(reaches(3), 30s));
        hosts.cable(false);
        auto const at = newest(hosts, "durable");
        BOOST_TEST(passes(hosts, "durable", at + 10, 120s));
        // Nothing hangs past its timeout: a peer that says nothing is lost.
        BOOST_TEST(copy_becomes([](auto const& c) { return c.value("connected", true) == false && c.contains("why"); }, 40s));
        hosts.cable(true);
        auto const later = newest(hosts, "durable");
        BOOST_TEST(copy_becomes(reaches(later), 60s));
        BOOST_TEST(newest(hosts, "failed") == 0u);
        promised = copy().value("durable_step", std::uint64_t{0});
        monitor.signal(SIGKILL);
        run.signal(SIGKILL);
        run.wait();
    }
    std::filesystem::remove_all(hosts.folder / "local");
    running_tool monitor(local);
    // The run may have gone on beyond what was promised.
    auto const last = stored_steps(hosts.folder / "stores/run").back() + 100;
    comes_to([&] { return run_tool({"monitor", "--status", "--unix", socket}).code == 0; });
    auto const ended = run_tool(train(hosts, hosts.folder / "local/run", last, to));
    BOOST_TEST(ended.code == 0, ended.err);
    BOOST_TEST(ended.err.find("the peer at tcp:10.87.0.2:7000") != std::string::npos, ended.err);
    BOOST_TEST(newest(hosts, "restored") >= promised);
    BOOST_TEST(copy_becomes(reaches(last), 30s));
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
    peer.signal(SIGTERM);
    BOOST_TEST(peer.ends_within(20s));
    hosts.at(' ');
    for (auto const& store : {"stores/run", "local/run"}) {
        expect_whole(hosts.folder / store);
    }
    auto const compared = run_tool({"diff", newest_file(hosts.folder / "stores/run"), newest_file(hosts.folder / "local/run")});
    BOOST_TEST(compared.code == 0, compared.out << compared.err);
}

BOOST_AUTO_TEST_CASE(without_a_certificate_of_the_authority_nobody_gets_in) {
    two_hosts hosts;
    if (!hosts.usable()) return;
    hosts.at('b');
    running_tool monitor(joined({"monitor", "--dir", hosts.folder / "stores", "--tcp", "10.87.0.2:7000"}, hosts.certificate("monitor")));
    hosts.at('a');
    auto const good = joined({"monitor", "--status", "--tcp", "10.87.0.2:7000"}, hosts.certificate("trainer"));
    comes_to([&] { return run_tool(good).code == 0; });
    BOOST_TEST(run_tool(good).code == 0);
    auto const plain = run_tool({"monitor", "--status", "--tcp", "10.87.0.2:7000"});
    BOOST_TEST(plain.code == 1);
    BOOST_TEST(plain.err.find("--cert") != std::string::npos, plain.err);
    // One that signed its own.
    BOOST_TEST_REQUIRE(shell("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=self -keyout " +
                             (hosts.folder / "self.key") + " -out " + (hosts.folder / "self.pem")));
    auto const self = run_tool({"monitor", "--status", "--tcp", "10.87.0.2:7000", "--cert", hosts.folder / "self.pem", "--key",
                                hosts.folder / "self.key", "--ca", hosts.folder / "ca.pem"});
    BOOST_TEST(self.code == 1);
    BOOST_TEST(line_count(self.err) == 1u, self.err);
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
}

}  // namespace varve_test
