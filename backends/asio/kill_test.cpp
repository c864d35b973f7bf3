#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <thread>

#include <varve/asio/monitor/monitor.hpp>
#include <varve/asio/monitor_sink.hpp>
#include <varve/checkpointer.hpp>
#include <varve/scheduling/layerwise.hpp>
#include <varve/staging/host.hpp>
#include <varve/store.hpp>

#include "comes_to.hpp"
#include "files.hpp"
#include "free_port.hpp"
#include "listens.hpp"
#include "plain_sinks.hpp"
#include "scratch_folder.hpp"

/// Trainers and monitors as processes, killed at random moments, many times: no LibTorch, so that a round takes some hundredths of
/// a second. This process has no threads of its own, and forks them.
namespace {

using namespace varve_test;
using namespace std::chrono_literals;
namespace fs = std::filesystem;
namespace va = varve::asio;

constexpr std::size_t block = varve::block_unit_bytes;
constexpr std::size_t floats_per_block = block / sizeof(float);
constexpr std::size_t pool_blocks = 16;

int rounds_of_each() { return full() ? 200 : 20; }

/// What the processes were told, in memory that outlives them.
struct told {
    std::atomic<std::uint64_t> step{0}, crash_safe{0}, durable{0}, at_peer{0};
    std::atomic<std::int64_t> restored{-1};  ///< -1: not yet
    std::atomic<bool> broken{false};         ///< a process found what it must not

    static void raise(std::atomic<std::uint64_t>& value, std::uint64_t to) noexcept {
        for (auto was = value.load(); was < to && !value.compare_exchange_weak(was, to);) {
        }
    }
    void on(varve::event const& e) noexcept {
        if (e.error) return;
        if (e.what == varve::milestone::crash_safe) raise(crash_safe, e.step);
        if (e.what == varve::milestone::durable) raise(durable, e.step);
    }
};

/// A process that does `work`, and dies with this one.
class process {
public:
    explicit process(std::function<void()> const& work) : pid_(::fork()) {
        if (pid_ < 0) throw std::runtime_error("cannot fork");
        if (pid_ > 0) return;
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::signal(SIGSEGV, SIG_DFL);  // the test's own handler would go on with the test
        try {
            work();
        } catch (std::exception const& e) {
            std::fprintf(stderr, "process %d: %s\n", static_cast<int>(::getpid()), e.what());
            ::_exit(1);
        }
        ::_exit(0);
    }
    ~process() {
        signal(SIGKILL);
        collect(0);
    }
    process(process const&) = delete;

    void signal(int number) const {
        if (!ended_) ::kill(pid_, number);
    }
    void kill(int number = SIGKILL) {
        signal(number);
        collect(0);
    }
    bool alive() { return !collect(WNOHANG); }
    /// Memory of memfd_create that it has open.
    std::size_t shared_memories() const {
        std::size_t out = 0;
        for (auto const& fd : fs::directory_iterator("/proc/" + std::to_string(pid_) + "/fd")) {
            std::error_code closed_meanwhile;
            out += fs::read_symlink(fd.path(), closed_meanwhile).string().starts_with("/memfd:");
        }
        return out;
    }
    /// Whether it ended by itself, and well.
    bool ends_well_within(std::chrono::milliseconds limit) {
        return comes_to([&] { return collect(WNOHANG); }, limit, 1ms) && WIFEXITED(status_) && WEXITSTATUS(status_) == 0;
    }

private:
    bool collect(int options) {
        if (!ended_) ended_ = ::waitpid(pid_, &status_, options) == pid_;
        return ended_;
    }
    pid_t pid_;
    int status_ = 0;
    bool ended_ = false;
};

/// A host's processes: a monitor, a trainer, and the folder that they write.
struct host {
    explicit host(bool unix_socket)
        : where(unix_socket ? va::parse_address("unix:" + (folder.path().filename() / "s").string())
                            : va::parse_address("tcp:127.0.0.1:" + std::to_string(free_port()))) {}

    void start_monitor() {
        // On SIGTERM it ends as it should, from its first moment on.
        sigset_t set, before;
        ::sigemptyset(&set);
        ::sigaddset(&set, SIGTERM);
        ::pthread_sigmask(SIG_BLOCK, &set, &before);
        monitor.emplace([this, &set] {
            va::monitor_options o;
            o.dir = folder.path() / "stores";
            o.listen = {where};
            o.memory_limit_bytes = 256u << 20;
            o.linger = 10s;
            o.peer = peer;
            o.peer_retry = 10ms;
            va::monitor m(o);
            std::jthread ends([&] {
                int number = 0;
                ::sigwait(&set, &number);
                m.stop();
            });
            std::jthread watches([&](std::stop_token stop) {
                while (peer && !stop.stop_requested()) {
                    auto const status = nlohmann::json::parse(m.status());
                    for (auto const& s : status["peer"]["stores"]) told::raise(words->at_peer, s.value("durable_step", std::uint64_t{0}));
                    std::this_thread::sleep_for(1ms);
                }
            });
            m.run();
        });
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    /// Trains without end from what its monitor has.
    void start_trainer(varve::when_busy busy) {
        words->restored = -1;
        trainer.emplace([this, busy] {
            toy_model model(2, floats_per_block);
            va::monitor_sink_options to;
            to.files.prepare = varve::prepare_mode::none;
            to.files.keep = 2;
            to.retry_after = 1ms;
            to.connect_limit = 5s;
            if (where.is_unix()) to.pool = std::make_shared<va::shared_pool>(pool_blocks * block, block);
            varve::checkpointer_options options;
            options.busy = busy;
            options.observers.add(*words);
            using type = varve::checkpointer<varve::host_staging, varve::layerwise<2>, va::monitor_sink>;
            std::optional<type> ck;
            for (auto const until = std::chrono::steady_clock::now() + 20s; !ck;) {
                try {
                    auto staging = to.pool ? varve::host_staging(to.pool->memory(), block, to.pool) : varve::host_staging(pool_blocks * block, block);
                    ck.emplace(model.state(), std::move(staging), varve::layerwise<2>{}, va::monitor_sink(where, "run", to), options);
                } catch (varve::error const& e) {
                    if (e.code() != varve::errc::monitor_lost || std::chrono::steady_clock::now() >= until) throw;
                    std::this_thread::sleep_for(2ms);
                }
            }
            auto const restored = ck->restore();
            std::uint64_t step = restored ? restored->step : 0;
            if (restored && !model.is_of(step)) words->broken = true;
            words->restored = static_cast<std::int64_t>(step);
            for (;;) {
                ck->begin(++step);
                words->step = step;
                for (std::size_t l = 0; l < 2; ++l) {
                    ck->before_update(l);
                    model.update(l, step);
                    ck->layer_ready(l);
                }
                ck->seal();
                // A step takes its time; without it replace would be all that happens.
                std::this_thread::sleep_for(200us);
            }
        });
    }
    void end_monitor() {
        monitor->signal(SIGTERM);
        BOOST_TEST(monitor->ends_well_within(20s));
        monitor.reset();
    }
    /// Everything that carries a checkpoint's name is whole; returns the newest step, 0 where there is none.
    std::uint64_t newest_whole() const {
        std::uint64_t newest = 0;
        std::error_code none;
        for (auto const& entry : fs::directory_iterator(folder.path() / "stores/run", none)) {
            auto const step = varve::detail::step_of_name(entry.path().filename().string(), ".safetensors");
            if (!step) continue;
            auto const file = open_file(entry.path());
            toy_model read(2, floats_per_block);
            BOOST_CHECK_NO_THROW(varve::safetensors().restore(file.get(), read.state(), {}));
            BOOST_TEST(read.is_of(*step), entry.path());
            newest = std::max(newest, *step);
        }
        return newest;
    }

    scratch_folder folder;
    va::address where;
    std::optional<va::address> peer;
    std::unique_ptr<told, void (*)(told*)> words{new (::mmap(nullptr, sizeof(told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) told,
                                                 [](told* t) { ::munmap(t, sizeof(told)); }};
    std::optional<process> monitor, trainer;
};

enum class victim { trainer, monitor, both };

class random_moments {
public:
    /// A quarter at any moment, the start included; the others once it saves.
    bool at_once() { return pick(0, 3) == 0; }
    void wait(int most_ms) { std::this_thread::sleep_for(std::chrono::microseconds(pick(0, most_ms * 1000))); }
    int pick(int low, int high) { return std::uniform_int_distribution<>(low, high)(random_); }

private:
    std::mt19937 random_{std::random_device{}()};
};

void kill_and_go_on(bool unix_socket, victim who) {
    host h(unix_socket);
    random_moments moments;
    std::uint64_t promised = 0;
    h.start_monitor();
    auto const went_on = [&] {
        if (!comes_to([&] { return h.words->restored >= 0 || !h.trainer->alive(); })) return false;
        BOOST_TEST(h.words->restored.load() >= static_cast<std::int64_t>(promised),
                   "promised step " << promised << " and went on from " << h.words->restored.load());
        return h.words->restored >= 0;
    };
    for (int round = 0; round < rounds_of_each(); ++round) {
        BOOST_TEST_CONTEXT("round " << round) {
            bool const anew = !h.trainer;
            if (anew) h.start_trainer(round % 2 ? varve::when_busy::replace : varve::when_busy::block);
            if (!moments.at_once() || who == victim::monitor) {
                if (anew) BOOST_TEST_REQUIRE(went_on());
                auto const before = h.words->durable.load();
                BOOST_TEST_REQUIRE(comes_to([&] { return h.words->durable > before; }));
            }
            moments.wait(20);
            if (who == victim::monitor) {
                h.monitor->kill();
                auto const durable = h.words->durable.load();
                BOOST_TEST(h.newest_whole() >= durable);
                // The trainer goes on, with another one.
                auto const step = h.words->step.load();
                h.start_monitor();
                BOOST_TEST_REQUIRE(comes_to([&] { return h.words->durable > step; }));
                BOOST_TEST(h.trainer->alive());
                // And now and then a new trainer finds what was promised.
                if (round % 10 != 9) continue;
                h.trainer->kill();
                promised = h.words->durable;
            } else {
                h.trainer->kill(round % 4 == 3 ? SIGSEGV : SIGKILL);
                promised = std::max<std::uint64_t>(promised, who == victim::trainer ? h.words->crash_safe : h.words->durable);
                if (who == victim::both) {
                    if (moments.at_once()) moments.wait(2);
                    h.monitor->kill();
                    BOOST_TEST(h.newest_whole() >= h.words->durable);
                    h.start_monitor();
                }
            }
            h.trainer.reset();
            // What is crash-safe and not durable yet goes with its monitor.
            if (who == victim::both) h.words->crash_safe = h.words->durable.load();
            BOOST_TEST_REQUIRE(!h.words->broken);
        }
    }
    h.start_trainer(varve::when_busy::block);
    BOOST_TEST_REQUIRE(went_on());
    auto const before = h.words->durable.load();
    BOOST_TEST(comes_to([&] { return h.words->durable > before; }));
    h.trainer->kill();
    h.trainer.reset();
    // Of all those trainers one checkpoint is left, that which lingers.
    BOOST_TEST(comes_to([&] { return h.monitor->shared_memories() <= 1; }), "the monitor has memory of " << h.monitor->shared_memories());
    h.end_monitor();
    BOOST_TEST(h.newest_whole() >= h.words->crash_safe);
    if (unix_socket) BOOST_TEST(!fs::exists(h.where.path));
    BOOST_TEST((::waitpid(-1, nullptr, WNOHANG) == -1 && errno == ECHILD));
    BOOST_TEST(!h.words->broken);
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_killed_trainer_loses_nothing_crash_safe_on_a_unix_socket) { kill_and_go_on(true, victim::trainer); }
BOOST_AUTO_TEST_CASE(a_killed_trainer_loses_nothing_crash_safe_over_tcp) { kill_and_go_on(false, victim::trainer); }
BOOST_AUTO_TEST_CASE(a_killed_monitor_loses_nothing_durable_on_a_unix_socket) { kill_and_go_on(true, victim::monitor); }
BOOST_AUTO_TEST_CASE(a_killed_monitor_loses_nothing_durable_over_tcp) { kill_and_go_on(false, victim::monitor); }
BOOST_AUTO_TEST_CASE(both_killed_lose_nothing_durable_on_a_unix_socket) { kill_and_go_on(true, victim::both); }
BOOST_AUTO_TEST_CASE(both_killed_lose_nothing_durable_over_tcp) { kill_and_go_on(false, victim::both); }

BOOST_AUTO_TEST_CASE(a_lost_host_loses_nothing_that_its_peer_had_durable) {
    host there(false), here(true);
    here.peer = there.where;
    random_moments moments;
    // A trainer that asks for a checkpoint while its peer is away is refused.
    auto const start_there = [&] {
        there.start_monitor();
        BOOST_TEST_REQUIRE(comes_to([&] { return listens(there.where); }));
    };
    start_there();
    std::uint64_t promised = 0;
    for (int round = 0; round < rounds_of_each(); ++round) {
        BOOST_TEST_CONTEXT("round " << round) {
            here.start_monitor();
            here.start_trainer(round % 2 ? varve::when_busy::replace : varve::when_busy::block);
            bool const trains = !moments.at_once();
            if (trains) {
                BOOST_TEST_REQUIRE(comes_to([&] { return here.words->restored >= 0; }));
                BOOST_TEST(here.words->restored.load() >= static_cast<std::int64_t>(promised));
                BOOST_TEST_REQUIRE(comes_to([&] { return here.words->at_peer > promised; }));
            }
            // Now and then the peer dies too, and nothing that trains here is disturbed.
            if (trains && round % 5 == 4) {
                there.monitor->kill();
                BOOST_TEST(there.newest_whole() >= here.words->at_peer);
                auto const durable = here.words->durable.load();
                BOOST_TEST_REQUIRE(comes_to([&] { return here.words->durable > durable; }));
                start_there();
            }
            moments.wait(20);
            here.monitor->kill();
            here.trainer->kill();
            promised = std::max<std::uint64_t>(promised, here.words->at_peer);
            fs::remove_all(here.folder.path() / "stores");
            BOOST_TEST_REQUIRE(!here.words->broken);
        }
    }
    there.end_monitor();
    BOOST_TEST(there.newest_whole() >= promised);
}
