#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <atomic>

#include "gate.hpp"
#include "moody_workplace.hpp"
#include "support.hpp"

namespace varve_test {

BOOST_AUTO_TEST_CASE(a_full_disk_fails_its_save_alone_and_what_is_older_stays) {
    for (std::size_t images : {0, 1, 2}) {
        moody_workplace w;
        auto t = w.trainer(images);
        t.greet();
        t.save(1, 1);
        t.peer.expect<wire::durable>();
        w.disk.go_on(ENOSPC);
        auto const image = images == 2 ? 1u : 0u;
        t.save(2, 2, image);
        auto const failed = t.peer.expect<wire::failed>();
        BOOST_TEST(failed.save == 2u);
        BOOST_TEST((failed.code == std::errc::no_space_on_device), failed.text);
        BOOST_TEST(!std::filesystem::exists(w.place.file(2)));
        BOOST_TEST(t.holds(w.place.file(1), 1));
        w.disk.go_on();
        while (t.peer.on_loan.size() > t.plans.size()) t.peer.expect<wire::release>();
        t.save(3, 3, image);
        t.peer.expect<wire::durable>();
        BOOST_TEST(t.holds(w.place.file(3), 3));
        BOOST_TEST(t.holds(w.place.file(1), 1));
    }
}

BOOST_AUTO_TEST_CASE(a_trainer_that_vanishes_amid_a_block_of_a_failed_save_leaves_the_store_free) {
    moody_workplace w;
    auto t = w.trainer(0);
    t.greet();
    w.disk.hold_up();
    t.set(1);
    t.begin(1, 1);
    t.send_block(1, 0);
    w.disk.wait_for_write();
    // Half of the next one: as the fourth frame.
    auto const bytes = t.block(t.plans[1]);
    std::vector<std::byte> frame;
    wire::frame_writer{}.append(frame, wire::block_data{1, t.plans[1].offset_bytes, bytes});
    wire::set_number(frame, 3);
    t.peer.send_bytes(std::span<std::byte const>(frame).first(frame.size() / 2));
    BOOST_TEST_REQUIRE(w.place.becomes([&](auto const& s) { return s["stores"][0]["held_bytes"] == t.plans[0].size_bytes + t.plans[1].size_bytes; }));
    w.disk.go_on(ENOSPC);
    BOOST_TEST_REQUIRE(w.place.becomes([](auto const& s) { return s["stores"][0]["failed"] == 1; }));
    t.peer.close();
    BOOST_TEST(w.place.store_is_free());
}

BOOST_AUTO_TEST_CASE(what_was_crash_safe_lingers_though_the_disk_is_full) {
    for (std::size_t images : {0, 2}) {
        moody_workplace w(true, 20s);
        auto t = w.trainer(images);
        w.loses_trainer_and_disk(t);
        BOOST_TEST(!std::filesystem::exists(w.place.file(1)));
        auto const image = fetched(t, w.place.monitor->where());
        BOOST_TEST_REQUIRE(image.has_value());
        BOOST_TEST(image->in_memory);
        BOOST_TEST(image->step == 1u);
        auto const lingering = w.place.status()["lingering"].at(0);
        BOOST_TEST(lingering["durable"] == false);
        // Whoever comes next writes on, where there is room again.
        w.disk.go_on();
        auto next = w.trainer(images);
        BOOST_TEST(next.greet().memory_step == 1u);
        next.save(1, 2);
        next.peer.expect<wire::durable>();
        BOOST_TEST(next.holds(w.place.file(2), 2));
    }
}

BOOST_AUTO_TEST_CASE(what_only_memory_has_lingers_though_there_is_no_more_of_it) {
    std::uint64_t pool_bytes = 0;
    {
        moody_workplace w(true, 20s);
        auto t = w.trainer(2);
        t.greet();
        pool_bytes = w.place.status()["memory_used_bytes"];
    }
    moody_workplace w(true, 20s, pool_bytes);
    auto t = w.trainer(2);
    w.loses_trainer_and_disk(t);
    auto const image = fetched(t, w.place.monitor->where());
    BOOST_TEST_REQUIRE(image.has_value());
    BOOST_TEST(image->step == 1u);
}

BOOST_AUTO_TEST_CASE(what_lingers_gives_way_to_what_was_saved_without_the_monitor) {
    for (bool durable : {true, false}) {
        moody_workplace w(true, 10min);
        auto t = w.trainer(2);
        if (durable) {
            t.greet();
            t.save(1, 1);
            t.peer.expect<wire::durable>();
            t.peer.close();
        } else {
            w.loses_trainer_and_disk(t);
        }
        BOOST_TEST_REQUIRE(w.place.becomes([](auto const& s) { return s.contains("lingering"); }));
        {
            workplace other(true, [&](auto& o) {
                o.dir = w.place.folder.path() / "stores";
                o.linger = 0ms;
            });
            auto beside = other.trainer(1);
            beside.greet();
            beside.save(1, 2);
            beside.peer.expect<wire::durable>();
        }
        auto const image = fetched(t, w.place.monitor->where());
        BOOST_TEST_REQUIRE(image.has_value());
        BOOST_TEST(image->step == 2u);
        BOOST_TEST(!image->in_memory);
        BOOST_TEST(!w.place.status().contains("lingering"));
    }
}

BOOST_AUTO_TEST_CASE(who_leaves_while_the_store_is_not_free_leaves_no_memory) {
    moody_workplace w;
    auto t = w.trainer(1);
    w.save_held_up(t);
    w.disk.wait_for_write();
    t.peer.close();
    BOOST_TEST_REQUIRE(w.trainer_is_gone());
    auto next = w.trainer(1);
    auto const before = shared_memories();
    next.peer.send(next.hello, {next.memory.get()});
    BOOST_TEST_REQUIRE(comes_to([&] { return shared_memories() > before; }));
    next.peer.close();
    BOOST_TEST(comes_to([&] { return shared_memories() == before; }));
}

BOOST_AUTO_TEST_CASE(while_the_disk_stands_still_every_save_is_crash_safe_and_gives_way_to_the_next) {
    moody_workplace w;
    auto t = w.trainer(3);
    t.hello.busy = varve::when_busy::replace;
    w.save_held_up(t);
    w.disk.wait_for_write();
    constexpr std::uint64_t saves = 12;
    for (std::uint64_t i = 2; i <= saves; ++i) {
        t.save(i, i, t.free_image());
        BOOST_TEST(t.peer.expect<wire::crash_safe>().save == i);
    }
    BOOST_TEST(w.place.status()["stores"][0]["in_flight"] == 2);  // the first, which is being written, and the newest
    w.disk.go_on();
    BOOST_TEST(t.peer.expect<wire::durable>().save == 1u);
    BOOST_TEST(t.peer.expect<wire::durable>().save == saves);
    auto const store = w.place.status()["stores"][0];
    BOOST_TEST(store["replaced"] == saves - 2);
    BOOST_TEST(store["failed"] == 0);
    BOOST_TEST(t.holds(w.place.file(1), 1));
    BOOST_TEST(t.holds(w.place.file(saves), saves));
}

BOOST_AUTO_TEST_CASE(a_hello_that_is_refused_leaves_what_lingers) {
    workplace w(true, [](auto& o) { o.linger = 20s; });
    auto t = w.trainer(2);
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    t.peer.close();
    BOOST_TEST_REQUIRE(w.becomes([](auto const& s) { return s.contains("lingering"); }));
    auto const lingers = w.status()["lingering"][0];
    BOOST_TEST(lingers["step"] == 1);
    BOOST_TEST(lingers["bytes"].get<std::uint64_t>() >= t.layout.data_bytes());
    BOOST_TEST(lingers["seconds_left"].get<double>() > 0);
    BOOST_TEST(lingers["seconds_left"].get<double>() <= 20);
    auto refused = [&](std::string const& words, std::function<void(raw_trainer&)> change) {
        auto other = w.trainer(1);
        change(other);
        other.peer.send(other.hello, {other.memory.get()});
        auto const why = other.peer.refusal();
        BOOST_TEST(has(why, words), why);
    };
    refused("checkpoints already", [](auto& o) { o.hello.fresh = true; });
    refused("another size", [](auto& o) {
        o.hello.fresh = o.hello.overwrite = true;
        o.hello.region_bytes[0] /= 2;
    });
    auto const image = fetched(t, w.monitor->where());
    BOOST_TEST_REQUIRE(image.has_value());
    BOOST_TEST(image->in_memory);
    // One that is taken starts over.
    auto fresh = w.trainer(1);
    fresh.hello.fresh = fresh.hello.overwrite = true;
    BOOST_TEST(fresh.greet().memory_step == 0u);
    BOOST_TEST(!w.status().contains("lingering"));
}

BOOST_AUTO_TEST_CASE(a_trainer_that_comes_back_is_welcomed_only_after_the_writes_of_its_last_connection) {
    for (std::size_t images : {0, 2}) {
        moody_workplace w;
        auto t = w.trainer(images);
        w.save_held_up(t);
        t.begin(2, 2);
        t.send_block(2, 0, t.plans.size());
        w.disk.wait_for_write();
        t.peer.close();
        auto next = w.trainer(images);
        next.peer.send(next.hello, next.pool ? std::vector<int>{next.memory.get()} : std::vector<int>{});
        BOOST_TEST_REQUIRE(w.trainer_is_gone());
        BOOST_TEST(!next.peer.hears_within(200ms));
        w.disk.go_on();
        BOOST_TEST(next.peer.expect<wire::welcome>().durable_step == 1u);
        next.save(1, 2);
        next.peer.expect<wire::durable>();
        BOOST_TEST(next.holds(w.place.file(1), 1));
        BOOST_TEST(next.holds(w.place.file(2), 2));
    }
}

BOOST_AUTO_TEST_CASE(a_trainer_that_went_while_its_store_was_opened_is_not_in_the_next_ones_way) {
    failing_calls calls;
    gate disk;
    disk.close();
    calls.on_open = [&](int) {
        disk.pass();
        return 0;
    };
    workplace w(true, [&](auto& o) { o.calls = &calls; });
    std::shared_ptr<void> const at_last(nullptr, [&](void*) { disk.open(); });  // whatever this test finds
    auto hello = [](raw_trainer& t) { t.peer.send(t.hello, {t.memory.get()}); };
    auto first = w.trainer(1);
    hello(first);
    BOOST_TEST(w.becomes([](auto const& s) { return s["stores"].size() == 1u; }));
    first.peer.close();
    auto next = w.trainer(1);
    hello(next);
    // For longer than one is given whose connection has not ended.
    BOOST_TEST(!next.peer.hears_within(1500ms));
    disk.open();
    BOOST_TEST(next.peer.expect<wire::welcome>().durable_step == 0u);
    next.save(1, 1);
    next.peer.expect<wire::durable>();
    BOOST_TEST(next.holds(w.file(1), 1));
}

BOOST_AUTO_TEST_CASE(a_disk_that_keeps_a_reader_waiting_holds_up_nobody_else) {
    failing_calls calls;
    gate disk;
    calls.on_open = [&](int flags) {
        if (flags == (O_RDONLY | O_NONBLOCK)) disk.pass();
        return 0;
    };
    workplace w(true, [&](auto& o) {
        o.calls = &calls;
        o.threads = 1;
    });
    std::shared_ptr<void> const at_last(nullptr, [&](void*) { disk.open(); });  // whatever this test finds
    auto t = w.trainer(2);
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    disk.close();
    raw_peer reader(w.monitor->where());
    reader.greet(wire::purpose::fetch);
    reader.send(wire::fetch{false, 0, 0});
    BOOST_TEST(!reader.hears_within(200ms));
    t.save(2, 2, 1);
    t.peer.expect<wire::durable>();
    disk.open();
    BOOST_TEST(reader.expect<wire::image>().step == 1u);
}

BOOST_AUTO_TEST_CASE(stop_in_mid_write_commits_what_is_crash_safe_and_discards_the_rest) {
    moody_workplace w;
    auto t = w.trainer(2);
    w.save_held_up(t);
    t.begin(2, 2);
    t.send_block(2, 0, t.plans.size());
    w.disk.wait_for_write();
    w.place.monitor->get().stop();
    BOOST_TEST(has(t.peer.refusal(), "the monitor is ending"));
    BOOST_TEST(!w.place.monitor->over());
    w.disk.go_on();
    w.place.monitor.reset();
    BOOST_TEST(t.holds(w.place.file(1), 1));
    BOOST_TEST(!std::filesystem::exists(w.place.file(2)));
}

BOOST_AUTO_TEST_CASE(a_fetch_while_saves_replace_the_newest_finds_a_whole_one) {
    workplace w;
    auto t = w.trainer(0);
    t.hello.keep = 1;
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    auto reader = w.trainer(0);
    std::atomic<bool> over = false;
    std::jthread saves([&] {
        for (std::uint64_t i = 2; !over; ++i) {
            t.save(i, i);
            t.peer.expect<wire::durable>();
        }
    });
    std::uint64_t last = 0;
    for (int i = 0; i < (full() ? 2000 : 60); ++i) {
        try {
            auto const image = fetched(reader, w.monitor->where());
            BOOST_TEST_REQUIRE(image.has_value());
            BOOST_TEST(image->step >= last);
            last = image->step;
        } catch (std::exception const& e) {
            BOOST_ERROR(e.what());
        }
    }
    over = true;
}

}  // namespace varve_test
