#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <optional>
#include <thread>

#include <varve/asio/monitor_sink.hpp>
#include <varve/checkpointer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/scheduling/layerwise.hpp>
#include <varve/scheduling/sync.hpp>
#include <varve/staging/host.hpp>

#include "listens.hpp"
#include "monitor_workplace.hpp"
#include "plain_sinks.hpp"
#include "test_certificates.hpp"

/// A trainer's checkpointer and a real monitor, in one process or in two.
namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;
using varve::asio::monitor_sink;
using varve::asio::shared_pool;

constexpr std::size_t block = varve::block_unit_bytes;
constexpr std::size_t floats_per_block = block / sizeof(float);

template <class Scheduling = varve::async<2>>
struct trainer {
    using checkpointer_type = varve::checkpointer<varve::host_staging, Scheduling, monitor_sink>;

    trainer(va::address where, std::string store, bool shared, std::size_t pool_blocks = 12, varve::checkpointer_options options = {},
            Scheduling scheduling = {}, varve::asio::monitor_sink_options to = {})
        : model(2, floats_per_block) {
        if (shared) to.pool = std::make_shared<shared_pool>(pool_blocks * block, block);
        to.files.prepare = varve::prepare_mode::none;
        to.files.keep = 3;
        auto staging = shared ? varve::host_staging(to.pool->memory(), block, to.pool) : varve::host_staging(pool_blocks * block, block);
        checkpointer.emplace(model.state(), std::move(staging), scheduling, monitor_sink(std::move(where), std::move(store), to), options);
    }
    varve::ticket step(std::uint64_t n) {
        checkpointer->begin(n);
        for (std::size_t l = 0; l < 2; ++l) {
            checkpointer->before_update(l);
            model.update(l, n);
            checkpointer->layer_ready(l);
        }
        return checkpointer->seal({{"loss", std::to_string(n)}});
    }

    toy_model model;
    std::optional<checkpointer_type> checkpointer;
};

/// On a Unix socket by reference and as payload, and over TCP.
template <class F>
void every_way(F&& f) {
    for (auto [unix_socket, shared] : {std::pair(true, true), std::pair(true, false), std::pair(false, false)})
        BOOST_TEST_CONTEXT((unix_socket ? "unix" : "tcp") << (shared ? ", by reference" : ", as payload")) f(unix_socket, shared);
}

template <class Scheduling>
void saves_and_restores(bool unix_socket, bool shared, Scheduling scheduling, std::size_t pool_blocks) {
    workplace w(unix_socket);
    {
        trainer<Scheduling> t(w.monitor->where(), "run", shared, pool_blocks, {}, scheduling);
        for (std::uint64_t n = 1; n <= 6; ++n) {
            auto ticket = t.step(n);
            if (n % 2 == 0) BOOST_TEST(!ticket.durable().wait_for(30s), "step " << n);
        }
        t.checkpointer->drain();
        t.model.update(99);
        auto restored = t.checkpointer->restore();
        BOOST_REQUIRE(restored.has_value());
        BOOST_TEST(restored->step == 6u);
        BOOST_TEST(restored->metadata.at("loss") == "6");
        BOOST_TEST(t.model.is_of(6));
        BOOST_TEST(t.checkpointer->restore(5)->step == 5u);
        BOOST_TEST(t.model.is_of(5));
        BOOST_CHECK_THROW(t.checkpointer->restore(1), varve::error);  // three are kept
        t.model.update(6);
    }
    auto const file = open_file(w.file(6));
    varve::safetensors().verify(file.get(), 1);
    toy_model fresh(2, floats_per_block);
    varve::safetensors().restore(file.get(), fresh.state(), {});
    BOOST_TEST(fresh.is_of(6));
}

/// Ends this process's connections to a Unix socket as something in between would: neither side has died.
int break_connections_to(std::filesystem::path const& socket) {
    int broken = 0;
    for (auto const& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
        int const fd = std::stoi(entry.path().filename().string());
        sockaddr_un peer{};
        socklen_t size = sizeof peer;
        if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0 || peer.sun_family != AF_UNIX || socket != peer.sun_path) continue;
        if (::shutdown(fd, SHUT_RDWR) == 0) ++broken;
    }
    return broken;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(relayed_run)

BOOST_AUTO_TEST_CASE(every_scheduling_saves_and_restores_every_way) {
    every_way([](bool unix_socket, bool shared) {
        for (std::size_t blocks : {1u, 3u, 12u}) {
            saves_and_restores(unix_socket, shared, varve::async<2>{}, blocks);
            saves_and_restores(unix_socket, shared, varve::layerwise<2>{}, blocks);
        }
        saves_and_restores(unix_socket, shared, varve::sync{}, 4);
    });
}

BOOST_AUTO_TEST_CASE(a_run_over_tls_saves_and_restores) {
    test_certificates files;
    if (!files.usable()) return;
    workplace w(false, [&](auto& o) { o.tls = files.load("server", true); });
    varve::asio::monitor_sink_options to;
    to.tls = files.load("client", false);
    trainer<> t(w.monitor->where(), "run", false, 8, {}, varve::async<2>{}, to);
    BOOST_TEST(!t.step(1).durable().wait_for(30s));
    t.model.update(9);
    BOOST_TEST(t.checkpointer->restore()->step == 1u);
    BOOST_TEST(t.model.is_of(1));
}

BOOST_AUTO_TEST_CASE(a_restarted_trainer_goes_on_from_what_lingers) {
    every_way([](bool unix_socket, bool shared) {
        workplace w(unix_socket, [](auto& o) { o.linger = 60s; });
        {
            trainer<> t(w.monitor->where(), "run", shared);
            for (std::uint64_t n = 1; n <= 3; ++n) t.step(n);
            t.checkpointer->drain();
        }
        trainer<> t(w.monitor->where(), "run", shared);
        auto restored = t.checkpointer->restore();
        BOOST_REQUIRE(restored.has_value());
        BOOST_TEST(restored->step == 3u);
        BOOST_TEST(t.model.is_of(3));
        BOOST_TEST(!t.step(4).durable().wait_for(30s));
    });
}

BOOST_AUTO_TEST_CASE(a_trainer_that_is_killed_loses_nothing_that_was_crash_safe) {
    int const moments = full() ? 100 : 8;
    every_way([&](bool unix_socket, bool shared) {
        for (int moment = 0; moment < moments; ++moment) {
            workplace w(unix_socket, [](auto& o) { o.linger = 60s; });
            auto const where = w.monitor->where();
            int told[2];
            BOOST_REQUIRE(::pipe(told) == 0);
            auto const child = ::fork();
            if (child == 0) {
                try {
                    trainer<> t(where, "run", shared);
                    for (std::uint64_t n = 1;; ++n) {
                        auto ticket = t.step(n);
                        if (!ticket.crash_safe().wait_for(30s) && ::write(told[1], &n, sizeof n) != sizeof n) break;
                    }
                } catch (...) {
                }
                ::_exit(1);
            }
            ::close(told[1]);
            std::uint64_t newest = 0;
            if (::read(told[0], &newest, sizeof newest) != sizeof newest) newest = 0;
            std::this_thread::sleep_for(std::chrono::microseconds(moment * 7919 % 40'000));
            ::kill(child, SIGKILL);
            ::waitpid(child, nullptr, 0);
            for (std::uint64_t n; ::read(told[0], &n, sizeof n) == sizeof n;) newest = n;
            ::close(told[0]);
            BOOST_TEST(newest >= 1u);
            trainer<> t(where, "run", shared);
            auto restored = t.checkpointer->restore();
            BOOST_REQUIRE(restored.has_value());
            BOOST_TEST(restored->step >= newest);
            BOOST_TEST(restored->step <= newest + 1);
            BOOST_TEST(t.model.is_of(restored->step));
            BOOST_TEST(!t.step(restored->step + 1).durable().wait_for(30s));
        }
    });
}

BOOST_AUTO_TEST_CASE(a_monitor_that_dies_is_replaced_and_no_durable_checkpoint_is_lost) {
    for (bool shared : {true, false}) {
        scratch_folder folder;
        auto const socket = va::parse_address("unix:" + (folder.path().filename() / "s").string());
        auto const serve = [&] {
            auto const child = ::fork();
            if (child != 0) return child;
            va::monitor_options o;
            o.dir = folder.path();
            o.listen = {socket};
            o.memory_limit_bytes = 512u << 20;
            try {
                va::monitor(o).run();
            } catch (...) {
            }
            ::_exit(0);
        };
        std::atomic<pid_t> monitor = serve();
        while (!listens(socket)) std::this_thread::sleep_for(1ms);
        varve::asio::monitor_sink_options to;
        to.retry_after = 1ms;
        to.respawn = [&] { monitor = serve(); };
        trainer<> t(socket, (folder.path() / "run").string(), shared, 6, {}, varve::async<2>{}, to);
        std::uint64_t durable = 0, n = 0;
        for (int round = 0; round < (full() ? 40 : 5); ++round) {
            for (int i = 0; i < 3; ++i)
                if (!t.step(++n).durable().wait_for(30s)) durable = n;
            BOOST_TEST(durable == n);
            auto first = t.step(++n), second = t.step(++n);
            std::this_thread::sleep_for(std::chrono::microseconds(round * 1237 % 9'000));
            ::kill(monitor, SIGKILL);
            ::waitpid(monitor, nullptr, 0);
            for (auto const& ticket : {first, second}) {
                auto const ec = ticket.durable().wait_for(30s);
                BOOST_TEST((!ec || ec == errc::monitor_lost), ec.message());
                if (!ec) durable = ticket.step();
            }
        }
        auto restored = t.checkpointer->restore();
        BOOST_REQUIRE(restored.has_value());
        BOOST_TEST(restored->step >= durable);
        BOOST_TEST(t.model.is_of(restored->step));
        BOOST_TEST(!t.step(++n).durable().wait_for(30s));
        t.checkpointer.reset();
        ::kill(monitor, SIGKILL);
        ::waitpid(monitor, nullptr, 0);
    }
}

BOOST_AUTO_TEST_CASE(a_connection_that_breaks_under_a_living_trainer_spoils_no_checkpoint) {
    workplace w;
    varve::asio::monitor_sink_options to;
    to.retry_after = 1ms;
    trainer<> t(w.monitor->where(), "run", true, 12, {}, {}, to);
    std::uint64_t n = 0;
    int broken = 0;
    for (int round = 0; round < (full() ? 100 : 20); ++round) {
        auto held = t.step(++n);
        // Now the monitor writes it from the pool, or it is still on its way there.
        bool const safe = round % 2 == 0 && !held.crash_safe().wait_for(30s);
        broken += break_connections_to(w.monitor->where().path);
        if (safe && round % 4 == 0) {
            for (auto const until = std::chrono::steady_clock::now() + 30s;
                 !std::filesystem::exists(w.file(n)) && std::chrono::steady_clock::now() < until;)
                std::this_thread::sleep_for(1ms);
            BOOST_TEST(std::filesystem::exists(w.file(n)), "what was crash-safe is committed: step " << n);
        }
        // The same pool serves the next saves at once; they may be lost, until there is another connection.
        for (int more = 0; more < 3; ++more) t.step(++n);
        std::error_code outcome = errc::monitor_lost;
        for (auto const until = std::chrono::steady_clock::now() + 30s; outcome && std::chrono::steady_clock::now() < until;)
            outcome = t.step(++n).durable().wait_for(30s);
        BOOST_TEST_REQUIRE(!outcome, outcome.message());
        t.checkpointer->drain();
        for (auto const& entry : std::filesystem::directory_iterator(w.file(n).parent_path())) {
            if (!entry.path().filename().string().starts_with("step-")) continue;
            auto const file = open_file(entry.path());
            varve::safetensors().verify(file.get(), 1);
            toy_model fresh(2, floats_per_block);
            varve::safetensors().restore(file.get(), fresh.state(), {});
            auto const step = varve::safetensors().identify(file.get()).step;
            BOOST_TEST(fresh.is_of(step), "step " << step);
        }
    }
    BOOST_TEST(broken > 0);
}

BOOST_AUTO_TEST_CASE(with_replace_every_step_is_crash_safe_and_the_newest_becomes_durable) {
    every_way([](bool unix_socket, bool shared) {
        workplace w(unix_socket);
        varve::checkpointer_options options;
        options.busy = varve::when_busy::replace;
        // Two, since a save leaves the window a moment after its ticket says that it is crash-safe.
        trainer<varve::async<2>> t(w.monitor->where(), "run", shared, 12, options);
        std::vector<varve::ticket> tickets;
        for (std::uint64_t n = 1; n <= 30; ++n) {
            tickets.push_back(t.step(n));
            auto const ec = tickets.back().crash_safe().wait_for(30s);
            BOOST_TEST(!ec, "step " << n << ": " << ec.message());
        }
        t.checkpointer->drain();
        std::size_t durable = 0;
        std::uint64_t newest = 0;
        for (auto const& ticket : tickets) {
            auto const ec = ticket.durable().wait();
            BOOST_TEST((!ec || ec == errc::replaced), ec.message());
            if (!ec) ++durable, newest = ticket.step();
        }
        BOOST_TEST(durable >= 1u);
        BOOST_TEST(newest == 30u);
        t.model.update(0);
        BOOST_TEST(t.checkpointer->restore()->step == newest);
        BOOST_TEST(t.model.is_of(newest));
    });
}

BOOST_AUTO_TEST_CASE(a_store_that_is_trained_already_is_refused_in_one_line) {
    workplace w;
    trainer<> first(w.monitor->where(), "run", true);
    BOOST_CHECK_EXCEPTION(trainer<>(w.monitor->where(), "run", true), varve::error, [](varve::error const& e) {
        return e.code() == errc::store_locked && has(e.what(), "another process is writing to this store");
    });
    trainer<> other(w.monitor->where(), "other", true);
    BOOST_TEST(!other.step(1).durable().wait_for(30s));
    BOOST_TEST(!first.step(1).durable().wait_for(30s));
}

BOOST_AUTO_TEST_SUITE_END()
