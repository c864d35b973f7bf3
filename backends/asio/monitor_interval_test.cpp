#include <boost/test/unit_test.hpp>

#include <atomic>
#include <chrono>
#include <filesystem>

#include "moody_workplace.hpp"

namespace varve_test {

/// Its saves wait so long for the disk, each of them in the monitor's memory.
struct paced_trainer : raw_trainer {
    paced_trainer(workplace& w, std::chrono::milliseconds interval) : raw_trainer(w.monitor->where(), "run", 3) {
        hello.busy = varve::when_busy::replace;
        hello.durable_interval_ms = static_cast<std::uint64_t>(interval.count());
    }
};

BOOST_AUTO_TEST_CASE(between_two_writes_of_an_interval_every_save_is_crash_safe_and_gives_way_to_the_next) {
    workplace w;
    paced_trainer t(w, 10min);
    t.greet();
    t.save(1, 1);
    BOOST_TEST(t.peer.expect<wire::durable>().save == 1u);
    for (std::uint64_t i = 2; i <= 5; ++i) {
        t.save(i, i, t.free_image());
        BOOST_TEST(t.peer.expect<wire::crash_safe>().save == i);
    }
    auto const store = w.status()["stores"][0];
    BOOST_TEST(store["durable_interval_sec"] == 600.0);
    BOOST_TEST(store["durable"] == 1);
    BOOST_TEST(store["replaced"] == 3);
    BOOST_TEST(store["crash_safe_step"] == 5);
    BOOST_TEST(!std::filesystem::exists(w.file(5)));
    // Nothing waits while the trainer does.
    t.peer.send(wire::drain{true});
    BOOST_TEST(t.peer.expect<wire::durable>().save == 5u);
    BOOST_TEST(t.holds(w.file(5), 5));
    t.peer.send(wire::drain{false});
    for (std::uint64_t i = 6; i <= 7; ++i) {
        t.save(i, i, t.free_image());
        BOOST_TEST(t.peer.expect<wire::crash_safe>().save == i);
    }
    BOOST_TEST(t.peer.expect<wire::failed>().save == 6u);
    BOOST_TEST(!std::filesystem::exists(w.file(7)));
    // Nor when it has gone.
    t.peer.close();
    BOOST_TEST(w.store_is_free());
    BOOST_TEST(t.holds(w.file(7), 7));
}

BOOST_AUTO_TEST_CASE(a_monitor_that_is_told_to_end_holds_nothing_back) {
    workplace w;
    paced_trainer t(w, 10min);
    t.greet();
    for (std::uint64_t i = 1; i <= 2; ++i) {
        t.save(i, i, t.free_image());
        t.peer.expect<wire::crash_safe>();
    }
    w.monitor->get().stop();
    BOOST_TEST(has(t.peer.refusal(), "the monitor is ending"));
    w.monitor.reset();
    BOOST_TEST(t.holds(w.file(2), 2));
}

BOOST_AUTO_TEST_CASE(where_there_is_no_room_for_another_save_beside_it_none_is_held_back) {
    std::atomic<bool> said = false;
    workplace w(true, [&](auto& o) {
        o.log = [&](std::string const& line) {
            if (has(line, "no room for three checkpoints")) said = true;
        };
    });
    auto t = w.trainer(1);
    t.hello.busy = varve::when_busy::replace;
    t.hello.durable_interval_ms = 600'000;
    t.greet();
    for (std::uint64_t i = 1; i <= 2; ++i) {
        t.save(i, i, t.free_image());
        BOOST_TEST(t.peer.expect<wire::durable>().save == i);
    }
    BOOST_TEST(said.load());
    BOOST_TEST(!w.status()["stores"][0].contains("durable_interval_sec"));
}

BOOST_AUTO_TEST_CASE(a_save_becomes_durable_when_its_interval_is_over) {
    workplace w;
    paced_trainer t(w, 300ms);
    t.greet();
    auto const start = std::chrono::steady_clock::now();
    for (std::uint64_t i = 1; i <= 3; ++i) {
        t.save(i, i, t.free_image());
        BOOST_TEST(t.peer.expect<wire::durable>().save == i);
        BOOST_TEST((std::chrono::steady_clock::now() - start >= (i - 1) * 300ms));
    }
}

BOOST_AUTO_TEST_CASE(a_write_that_fails_does_not_use_up_the_interval) {
    moody_workplace w;
    auto t = w.trainer(3);
    t.hello.busy = varve::when_busy::replace;
    t.hello.durable_interval_ms = 600'000;
    t.greet();
    w.disk.go_on(ENOSPC);
    t.save(1, 1);
    BOOST_TEST((t.peer.expect<wire::failed>().code == std::errc::no_space_on_device));
    w.disk.go_on();
    t.save(2, 2, t.free_image());
    BOOST_TEST(t.peer.expect<wire::durable>().save == 2u);
}

BOOST_AUTO_TEST_CASE(an_interval_is_for_saves_that_give_way) {
    workplace w;
    paced_trainer t(w, 300ms);
    t.hello.busy = varve::when_busy::block;
    t.peer.send(t.hello, {t.memory.get()});
    BOOST_TEST(has(t.peer.refusal(), "an interval of 300 ms"));
}

}  // namespace varve_test
