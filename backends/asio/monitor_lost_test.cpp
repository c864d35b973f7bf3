#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <stdexcept>
#include <thread>

#include "comes_to.hpp"
#include "fake_monitors_trainer.hpp"
#include "gate.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;

/// The monitor takes the save and commits it, and the trainer hears of it.
void commits(fake_connection& c, trainer& t, varve::ticket const& ticket, std::uint64_t sequence) {
    auto const save = c.take_save(t.hello);
    c.finish(save, sequence);
    BOOST_TEST(!ticket.durable().wait_for(20s));
    BOOST_TEST(t.holds(save.image, ticket.step()));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(monitor_lost)

BOOST_FIXTURE_TEST_CASE(a_monitor_that_dies_fails_what_is_in_flight_and_the_next_save_finds_another, at_socket) {
    trainer t(monitor, 3);
    std::atomic<int> spawned = 0;
    t.options.respawn = [&] {
        monitor.listen();
        ++spawned;
    };
    auto c = t.start();
    auto first = t.save(1);
    auto const lost = c->take_save(t.hello);
    monitor.die();
    c.reset();
    BOOST_TEST(first.crash_safe().wait_for(20s) == errc::monitor_lost);
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
    BOOST_TEST(spawned == 0);
    // Every block was on loan: they are there again.
    auto second = t.save(2);
    comes_to([&] { return spawned != 0; }, 20s, 1ms);
    c = monitor.accept();
    auto const again = c->greet();
    BOOST_TEST(spawned == 1);
    BOOST_TEST(again.region_bytes == t.hello.region_bytes);
    auto const save = c->take_save(t.hello);
    BOOST_TEST(t.holds(save.image, 2));
    BOOST_TEST(save.begin.save > lost.begin.save);
    c->finish(save, 2);
    BOOST_TEST(!second.durable().wait_for(20s));
}

BOOST_FIXTURE_TEST_CASE(a_trainer_that_drains_says_so_to_the_monitor_that_takes_over, at_socket) {
    gate taken_over;
    std::atomic<bool> there = false, drains = false;
    trainer t(monitor, 6);
    t.options.durable_interval = 10min;
    t.checkpointer_options.busy = varve::when_busy::replace;
    std::future<void> drained;  // outlives the connection that it waits for
    t.options.respawn = [&] {
        taken_over.pass();
        monitor.listen();
        there = true;
    };
    auto c = t.start();
    auto const lost = t.save(1);
    c->take_save(t.hello);
    taken_over.close();
    monitor.die();
    c.reset();
    BOOST_TEST(lost.durable().wait_for(20s) == errc::monitor_lost);
    auto const ticket = t.save(2);
    drained = std::async(std::launch::async, [&] {
        drains = true;
        t.checkpointer->drain();
    });
    BOOST_TEST_REQUIRE(comes_to([&] { return drains.load(); }));
    BOOST_TEST((drained.wait_for(300ms) == std::future_status::timeout));
    taken_over.open();
    BOOST_TEST_REQUIRE(comes_to([&] { return there.load(); }));
    c = monitor.accept();
    c->greet();
    BOOST_TEST(c->expect<wire::drain>().on);
    commits(*c, t, ticket, 1);
    drained.get();
    BOOST_TEST(!c->expect<wire::drain>().on);
}

BOOST_FIXTURE_TEST_CASE(a_run_that_begins_with_a_monitor_that_ends_goes_on_with_the_next, at_socket) {
    trainer t(monitor, 3);
    gate dead;
    dead.close();
    std::atomic<int> spawned = 0;
    t.options.respawn = [&] {
        dead.pass();
        monitor.listen();
        ++spawned;
    };
    auto made = std::async(std::launch::async, [&] { t.make(); });
    auto c = monitor.accept();
    c->expect<wire::hello>();
    c->say(wire::refusal{errc::cancelled, "the monitor is ending"});
    c = monitor.accept();
    c->expect<wire::hello>();
    monitor.die();
    dead.open();
    c.reset();
    BOOST_TEST_REQUIRE(comes_to([&] { return spawned != 0; }));
    c = monitor.accept();
    t.hello = c->greet();
    made.get();
    BOOST_TEST(spawned == 1);
    commits(*c, t, t.save(1), 1);
}

BOOST_FIXTURE_TEST_CASE(a_run_that_begins_without_a_monitor_is_told_so, at_socket) {
    trainer t(monitor, 3);
    auto made = std::async(std::launch::async, [&] { t.make(); });
    auto c = monitor.accept();
    c->expect<wire::hello>();
    c.reset();
    BOOST_CHECK_EXCEPTION(made.get(), varve::error, [](auto const& e) { return e.code() == errc::monitor_lost; });
    // Refused for what it is: not tried again.
    t.options.respawn = [] { throw std::logic_error("nobody has died"); };
    made = std::async(std::launch::async, [&] { t.make(); });
    c = monitor.accept();
    c->expect<wire::hello>();
    c->say(wire::refusal{errc::mismatch, "another model"});
    BOOST_CHECK_EXCEPTION(made.get(), varve::error, [](auto const& e) { return e.code() == errc::mismatch; });
}

BOOST_FIXTURE_TEST_CASE(without_a_monitor_saves_fail_and_training_goes_on, at_socket) {
    trainer t(monitor, 3);
    auto c = t.start();
    monitor.die();
    c.reset();
    for (std::uint64_t step = 1; step <= 5; ++step) BOOST_TEST(t.save(step).durable().wait_for(20s) == errc::monitor_lost);
    monitor.listen();
    std::this_thread::sleep_for(5ms);
    auto ticket = t.save(6);
    c = monitor.accept();
    c->greet();
    commits(*c, t, ticket, 1);
}

BOOST_FIXTURE_TEST_CASE(blocks_of_a_connection_that_was_lost_wait_for_the_monitors_word, at_socket) {
    trainer t(monitor, 3);
    auto c = t.start();
    auto first = t.save(1);
    auto const lost = c->take_save(t.hello);
    c->say(wire::crash_safe{lost.begin.save});
    BOOST_TEST(!first.crash_safe().wait_for(20s));
    // The monitor is alive, and may be writing these very blocks.
    c.reset();
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
    c = monitor.accept();
    c->map(c->expect<wire::hello>());
    t.model.update(2);
    auto second = std::async(std::launch::async, [&] { return t.checkpointer->save(2); });
    std::this_thread::sleep_for(50ms);
    std::vector<std::byte> still(c->regions[0]->memory.begin(), c->regions[0]->memory.end());
    BOOST_TEST((std::memcmp(still.data() + lost.blocks[1].region_offset, lost.image.data() + lost.blocks[1].image_offset, lost.blocks[1].size) == 0));
    c->say(wire::welcome{});
    auto const save = c->take_save(t.hello);
    BOOST_TEST(t.holds(save.image, 2));
    c->finish(save, 2);
    BOOST_TEST(!second.get().durable().wait_for(20s));
}

BOOST_FIXTURE_TEST_CASE(a_monitor_that_breaks_the_protocol_is_lost, at_socket) {
    std::vector<std::function<void(fake_connection&, fake_connection::taken const&)>> const wrongs{
        [](auto& c, auto const&) { c.say(wire::release{0, 12'345}); },
        [](auto& c, auto const&) { c.say(wire::welcome{}); },
        [](auto& c, auto const&) { c.say(wire::credit{~std::uint64_t{0}}), c.say(wire::credit{1}); },
        [](auto& c, auto const&) { c.say_bytes(std::as_bytes(std::span("HTTP/1.1 400 Bad Request\r\n\r\n"))); },
        [](auto& c, auto const& s) {
            // Said twice: its number is not the next.
            std::vector<std::byte> frame;
            wire::frame_writer{}.append(frame, wire::crash_safe{s.begin.save});
            c.say_bytes(frame);
        },
        [](auto& c, auto const&) { c.say(wire::refusal{errc::malformed, "I do not understand"}); },
    };
    trainer t(monitor, 6);
    auto c = t.start();
    std::uint64_t step = 0;
    for (auto const& wrong : wrongs) {
        auto ticket = t.save(++step);
        auto const save = c->take_save(t.hello);
        wrong(*c, save);
        BOOST_TEST(ticket.durable().wait_for(20s) == errc::monitor_lost, "wrong " << step);
        c = monitor.accept();
        c->greet();
    }
    auto ticket = t.save(++step);
    auto const save = c->take_save(t.hello);
    c->finish(save, 1);
    BOOST_TEST(!ticket.durable().wait_for(20s));
}

BOOST_FIXTURE_TEST_CASE(a_monitor_that_falls_silent_is_lost, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 1s;
    auto c = t.start();
    auto first = t.save(1);  // it said WELCOME, and says nothing since
    c->take_save(t.hello);
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
}

BOOST_FIXTURE_TEST_CASE(a_monitor_that_pings_is_not_lost, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 2s;
    auto c = t.start();
    auto first = t.save(1);
    auto const save = c->take_save(t.hello);
    for (int i = 0; i < 50; ++i) {
        std::this_thread::sleep_for(50ms);
        c->say(wire::ping{});
        c->expect<wire::pong>();
    }
    c->finish(save, 1);
    BOOST_TEST(!first.durable().wait_for(20s));
}

BOOST_FIXTURE_TEST_CASE(training_goes_on_beside_a_monitor_that_stays_stopped_with_every_block, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 1s;
    auto c = t.start();
    auto first = t.save(1);
    c->take_save(t.hello);
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
    for (std::uint64_t step = 2; step <= 3; ++step) {
        t.model.update(step);
        auto saved = std::async(std::launch::async, [&] {
            auto ticket = t.checkpointer->save(step);
            t.checkpointer->before_update();
            return ticket;
        });
        if (saved.wait_for(20s) != std::future_status::ready) {
            monitor.die();
            c.reset();
            BOOST_FAIL("step " << step << " hangs");
        }
        BOOST_TEST(saved.get().durable().wait_for(20s) == errc::monitor_lost);
    }
}

BOOST_FIXTURE_TEST_CASE(a_save_that_waits_for_blocks_of_a_monitor_that_is_stopped_is_lost, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 1s;
    auto c = t.start();
    auto const first = t.save(1);
    auto const save = c->take_save(t.hello);
    c->say(wire::crash_safe{save.begin.save});
    c->say(wire::durable{save.begin.save, 1});  // and it keeps the blocks, as of the newest
    BOOST_TEST(!first.durable().wait_for(20s));
    auto const second = t.save(2);
    c->expect<wire::begin>();
    auto updates = std::async(std::launch::async, [&] { t.checkpointer->before_update(); });
    bool const in_time = updates.wait_for(20s) == std::future_status::ready;
    BOOST_TEST(in_time);
    if (!in_time) {
        monitor.die();
        c.reset();
    }
    BOOST_TEST(second.durable().wait_for(20s) == errc::monitor_lost);
}

BOOST_FIXTURE_TEST_CASE(blocks_of_a_monitor_that_falls_silent_and_dies_come_back, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 1s;
    auto c = t.start();
    auto first = t.save(1);
    c->take_save(t.hello);
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
    // Every block is on loan, and nobody starts another monitor.
    monitor.die();
    c.reset();
    t.model.update(2);
    auto second = std::async(std::launch::async, [&] { return t.checkpointer->save(2); });
    BOOST_TEST_REQUIRE((second.wait_for(20s) == std::future_status::ready));
    BOOST_TEST(second.get().durable().wait_for(20s) == errc::monitor_lost);
    t.checkpointer->before_update();
}

BOOST_FIXTURE_TEST_CASE(a_monitor_that_falls_silent_and_dies_is_followed_by_another_at_once, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 2s;
    t.options.retry_after = 10min;
    gate dead;
    dead.close();
    std::atomic<bool> spawned = false;
    t.options.respawn = [&] {
        dead.pass();
        monitor.listen();
        spawned = true;
    };
    auto c = t.start();
    auto first = t.save(1);
    c->take_save(t.hello);
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
    // The connection that asks for the blocks again is not answered either.
    auto again = monitor.accept();
    again->expect<wire::hello>();
    BOOST_TEST(!again->next().has_value());
    BOOST_TEST(t.save(2).durable().wait_for(20s) == errc::monitor_lost);
    again.reset();
    monitor.die();
    dead.open();
    c.reset();
    auto next = t.save(3);
    BOOST_TEST_REQUIRE(comes_to([&] {
        if (!spawned && next.durable().wait_for(0s) == errc::monitor_lost) next = t.save(next.step() + 1);
        return spawned.load();
    }));
    c = monitor.accept();
    c->greet();
    commits(*c, t, next, 1);
}

BOOST_FIXTURE_TEST_CASE(blocks_come_back_from_a_monitor_that_refuses_the_run_when_it_is_found_again, at_socket) {
    trainer t(monitor, 3);
    auto c = t.start();
    auto first = t.save(1);
    c->take_save(t.hello);
    c.reset();
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
    std::atomic<bool> over = false;
    auto refusing = std::async(std::launch::async, [&] {
        while (!over) {
            try {
                auto again = monitor.accept();
                again->expect<wire::hello>();
                again->say(wire::refusal{std::make_error_code(std::errc::no_space_on_device), "no room"});
            } catch (std::exception const&) {
            }
        }
    });
    auto second = t.save(2);
    BOOST_TEST(second.durable().wait_for(20s) == errc::monitor_lost);
    t.checkpointer->before_update();
    over = true;
    while (refusing.wait_for(1ms) != std::future_status::ready) t.save(3);  // comes to be refused once more
}

BOOST_AUTO_TEST_SUITE_END()
