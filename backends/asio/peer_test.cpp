#include <boost/test/unit_test.hpp>

#include <sys/stat.h>
#include <fstream>

#include "fake_monitor.hpp"
#include "monitor_workplace.hpp"
#include "support.hpp"
#include "test_certificates.hpp"

namespace varve_test {

namespace {

/// Two monitors in folders of their own: the second is the first's peer.
struct two_monitors {
    explicit two_monitors(std::function<void(va::monitor_options&)> change = [](auto&) {})
        : there(false), here(true, [&](auto& o) {
              o.peer = there.monitor->where();
              o.peer_retry = 50ms;
              change(o);
          }) {}

    nlohmann::json copy() { return here.status()["peer"]["stores"].at(0); }
    bool peer_gets(std::uint64_t step) {
        return here.becomes(
            [&](auto const& s) { return s["peer"]["stores"].size() == 1u && s["peer"]["stores"][0].value("durable_step", 0u) == step; });
    }

    workplace there, here;
};

/// A monitor whose peer the test plays, and a trainer that it has welcomed.
struct played_peer {
    fake_monitor peer;
    workplace here{true, [this](auto& o) {
                       o.peer = peer.where();
                       o.peer_retry = 20ms;
                   }};
    raw_trainer t = here.trainer(1);
    wire::welcome const welcome = t.greet();
};

/// Saves the step and waits for it.
void saves(raw_trainer& t, std::uint64_t step, std::size_t image = 0) {
    t.save(step, step, image);
    while (t.peer.expect<wire::durable>().save != step) {
    }
}

struct fetched {
    wire::image about;
    varve::file_descriptor file;
};
/// What the monitor answers a FETCH with, on a Unix socket.
fetched fetch(va::address const& from, wire::fetch const& what, bool relayed = false) {
    raw_peer asks(from);
    asks.greet(wire::purpose::fetch, relayed);
    asks.send(what);
    fetched out{asks.expect<wire::image>(), {}};
    if (auto along = asks.descriptors(); !along.empty()) out.file = std::move(along[0]);
    return out;
}

/// A checkpoint of that step in a monitor's folder, whose trainer has gone.
void leave(workplace& w, std::initializer_list<std::uint64_t> steps) {
    auto t = w.trainer(0);
    t.greet();
    for (auto step : steps) saves(t, step);
    t.peer.send(wire::goodbye{});
    t.peer.close();
    BOOST_TEST_REQUIRE(w.becomes([](auto const& s) { return s["stores"].empty() && !s.contains("lingering"); }));
}

void flip_a_byte(std::filesystem::path const& file) {
    std::fstream f(file, std::ios::in | std::ios::out | std::ios::binary);
    f.seekp(-1, std::ios::end);
    f.put('\x5A');
}

}  // namespace

BOOST_AUTO_TEST_CASE(what_is_committed_here_is_committed_at_the_peer_bit_for_bit) {
    for (std::size_t images : {0, 2}) {
        two_monitors w;
        auto t = w.here.trainer(images);
        t.greet();
        for (std::uint64_t step : {1, 2, 3}) saves(t, step, images ? step % 2 : 0);
        BOOST_TEST_REQUIRE(w.peer_gets(3));
        BOOST_TEST(t.holds(w.there.file(3), 3));
        // The same metadata and header too, but for the peer's own sequence.
        varve::file_descriptor copy(::open(w.there.file(3).c_str(), O_RDONLY), varve::system_calls::kernel());
        BOOST_TEST(varve::safetensors().identify(copy.get()).metadata.at("who") == "test");
        auto const s = w.copy();
        BOOST_TEST(s["connected"] == true);
        BOOST_TEST(s["step"] == 3);
        BOOST_TEST(s["up_to_date"] == true);
        BOOST_TEST(s["crash_safe_step"] == 3);
        BOOST_TEST(s["bytes_sent"].get<std::uint64_t>() >= t.layout.data_bytes());
        BOOST_TEST(s["sent_gb_per_s"].get<double>() > 0);
    }
}

BOOST_AUTO_TEST_CASE(the_peer_is_reached_over_tls_and_without_it_on_loopback_alone) {
    test_certificates files;
    if (!files.usable()) return;
    workplace there(false, [&](auto& o) { o.tls = files.load("server", true); });
    workplace here(true, [&](auto& o) {
        o.peer = there.monitor->where();
        o.peer_tls = files.load("client", false);
    });
    auto t = here.trainer(1);
    t.greet();
    saves(t, 1);
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("durable_step", 0) == 1; }));
    BOOST_TEST(t.holds(there.file(1), 1));
    BOOST_CHECK_EXCEPTION(workplace(true, [](auto& o) { o.peer = va::parse_address("tcp:192.0.2.7:7000"); }), varve::error,
                          [](varve::error const& e) { return e.code() == std::errc::operation_not_permitted; });
}

BOOST_AUTO_TEST_CASE(a_peer_that_stalls_holds_up_nothing_and_gets_the_newest_next) {
    fake_monitor stalls;
    workplace here(true, [&](auto& o) { o.peer = stalls.where(); });
    auto t = here.trainer(1);
    t.hello.keep = 1;
    t.greet();
    auto const peer = stalls.accept();
    auto const hello = peer->greet({wire::version, 0, 0, 0, 64u << 10});  // one piece, and no more for now
    BOOST_TEST(hello.relayed);
    BOOST_TEST(hello.store == "run");
    saves(t, 1);
    // By now it reads the file.
    auto const begun = peer->expect<wire::begin>();
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("sending_step", 0) == 1; }));
    // The store lets go of the first four meanwhile, and writes their files again.
    for (std::uint64_t step : {2, 3, 4, 5}) saves(t, step);
    BOOST_TEST(!std::filesystem::exists(here.file(1)));
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("step", 0) == 5; }));
    peer->say(wire::credit{1u << 30});
    auto const first = peer->take_save(begun, hello);
    BOOST_TEST(first.begin.step == 1u);
    t.set(1);
    BOOST_TEST(first.commit.chunk_digests == t.digests(), boost::test_tools::per_element());
    for (auto const& plan : t.plans) {
        auto const bytes = t.block(plan);
        BOOST_TEST(std::equal(bytes.begin(), bytes.end(), first.image.begin() + static_cast<std::ptrdiff_t>(plan.offset_bytes)));
    }
    peer->finish(first, 1);
    auto const second = peer->take_save(hello);
    BOOST_TEST(second.begin.step == 5u);
    peer->finish(second, 2);
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("durable_step", 0) == 5; }));
    BOOST_TEST(here.status()["peer"]["stores"][0]["up_to_date"] == true);
}

BOOST_AUTO_TEST_CASE(a_peer_that_is_away_is_told_of_once_and_gets_the_newest_when_it_comes) {
    std::optional<workplace> there(std::in_place, false);
    auto const at = there->monitor->where();
    there->monitor.reset();
    std::atomic<int> said = 0;
    workplace here(true, [&](auto& o) {
        o.peer = at;
        o.peer_retry = 20ms;
        o.log = [&](std::string const& line) { said += has(line, "nothing reaches the peer"); };
    });
    auto t = here.trainer(1);
    t.greet();
    saves(t, 1);
    BOOST_TEST_REQUIRE(here.becomes([&](auto const& s) { return s["peer"]["stores"][0].contains("why") && said > 0; }));
    std::this_thread::sleep_for(150ms);  // for some tries more
    auto const away = here.status()["peer"]["stores"][0];
    BOOST_TEST(away.at("connected") == false);
    BOOST_TEST(!away.at("why").get<std::string>().empty());
    BOOST_TEST(said == 1);
    // What it would send with is a trainer's meanwhile.
    BOOST_TEST(here.becomes([&](auto const& s) { return s["memory_used_bytes"] == t.pool_bytes; }));
    for (std::uint64_t step : {2, 3}) saves(t, step);
    // It comes with its trainer gone, too.
    t.peer.close();
    auto again = [&] {
        va::monitor_options o;
        o.dir = there->folder.path() / "stores";
        o.listen = {at};
        o.memory_limit_bytes = 512u << 20;
        there->monitor.emplace(o);
    };
    again();
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("durable_step", 0) == 3; }));
    BOOST_TEST(t.holds(there->file(3), 3));
    BOOST_TEST(!std::filesystem::exists(there->file(2)));
}

BOOST_FIXTURE_TEST_CASE(a_peer_that_dies_in_mid_save_gets_the_whole_of_it_again, played_peer) {
    auto connection = peer.accept();
    connection->greet({wire::version, 0, 0, 0, 64u << 10});
    saves(t, 1);
    connection->expect<wire::begin>();
    connection->expect<wire::block_data>();
    connection.reset();
    saves(t, 2);
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("step", 0) == 2; }));
    connection = peer.accept();
    auto const hello = connection->greet({wire::version, 0, 0, 0, 1u << 30});
    auto const whole = connection->take_save(hello);
    BOOST_TEST(whole.begin.step == 2u);
    t.set(2);
    BOOST_TEST(whole.commit.chunk_digests == t.digests(), boost::test_tools::per_element());
    connection->finish(whole, 1);
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("durable_step", 0) == 2; }));
}

BOOST_FIXTURE_TEST_CASE(what_a_peer_has_not_committed_in_the_end_does_not_count_as_safe_there, played_peer) {
    auto const connection = peer.accept();
    auto const hello = connection->greet({wire::version, 0, 0, 0, 1u << 30});
    saves(t, 1);
    auto const save = connection->take_save(hello);
    connection->say(wire::crash_safe{save.begin.save});
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("crash_safe_step", 0) == 1; }));
    connection->say(wire::failed{save.begin.save, std::make_error_code(std::errc::no_space_on_device), "no room"});
    BOOST_TEST(here.becomes([](auto const& s) { return has(s["peer"]["stores"][0].value("why", ""), "not committed"); }));
    BOOST_TEST(!here.status()["peer"]["stores"][0].contains("crash_safe_step"));
}

BOOST_FIXTURE_TEST_CASE(a_checkpoint_that_broke_on_the_disk_does_not_reach_the_peer, played_peer) {
    auto const connection = peer.accept();
    saves(t, 1);
    flip_a_byte(here.file(1));
    auto const hello = connection->greet({wire::version, 0, 0, 0, 1u << 30});
    connection->expect<wire::begin>();
    auto type = connection->next();
    while (type == wire::message::block_data) type = connection->next();
    BOOST_TEST((type == wire::message::abandon));
    BOOST_TEST(here.becomes([](auto const& s) { return has(s["peer"]["stores"][0].value("why", ""), "do not fit their digest"); }));
    saves(t, 2);
    // It may be tried again before the next one is there.
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("step", 0) == 2; }));
    for (bool taken = false; !taken;) {
        auto const begun = connection->expect<wire::begin>();
        for (type = connection->next(); type == wire::message::block_data;) type = connection->next();
        taken = type == wire::message::commit;
        BOOST_TEST(taken == (begun.step == 2u));
        if (taken) {
            connection->say(wire::crash_safe{begun.save});
            connection->say(wire::durable{begun.save, 1});
        }
    }
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("durable_step", 0) == 2; }));
}

BOOST_AUTO_TEST_CASE(a_restart_takes_from_the_peer_what_is_newer_there_or_not_here) {
    two_monitors w;
    leave(w.there, {4, 7});
    auto t = w.there.trainer(0, "unused");
    // Nothing is here.
    auto newest = fetch(w.here.monitor->where(), {false, 0, 0});
    BOOST_TEST(newest.about.step == 7u);
    BOOST_TEST(has(newest.about.name, "the peer at "), newest.about.name);
    BOOST_TEST((::fcntl(newest.file.get(), F_GETFL) & O_ACCMODE) == O_RDONLY);
    BOOST_TEST(t.holds(newest.file.get(), 7));
    BOOST_TEST(fetch(w.here.monitor->where(), {false, 0, 1}).about.step == 4u);
    BOOST_TEST(fetch(w.here.monitor->where(), {false, 0, 2}).about.size_bytes == 0u);
    BOOST_TEST(fetch(w.here.monitor->where(), {true, 4, 0}).about.step == 4u);
    BOOST_TEST(fetch(w.here.monitor->where(), {true, 5, 0}).about.size_bytes == 0u);
    // Where memory has no room it is a file without a name; nothing is left behind by either.
    {
        workplace small(true, [&](auto& o) {
            o.peer = w.there.monitor->where();
            o.memory_limit_bytes = 1u << 20;
        });
        std::filesystem::create_directories(small.folder.path() / "stores");
        auto const on_disk = fetch(small.monitor->where(), {false, 0, 0});
        BOOST_TEST(t.holds(on_disk.file.get(), 7));
        struct stat info{};
        BOOST_TEST(::fstat(on_disk.file.get(), &info) == 0);
        BOOST_TEST(info.st_nlink == 0u);
        BOOST_TEST(std::filesystem::is_empty(small.folder.path() / "stores"));
    }
    BOOST_TEST(w.here.becomes([](auto const& s) { return s["memory_used_bytes"] == 0; }));
    BOOST_TEST(!std::filesystem::exists(w.here.folder.path() / "stores/run"));
}

BOOST_AUTO_TEST_CASE(what_is_newer_comes_first_wherever_it_is) {
    two_monitors w;
    leave(w.there, {4, 7});
    {
        // A store of an earlier life, older than the peer's.
        workplace alone;
        leave(alone, {3, 5});
        std::filesystem::copy(alone.folder.path() / "stores", w.here.folder.path() / "stores", std::filesystem::copy_options::recursive);
    }
    std::vector<std::uint64_t> order;
    for (std::uint32_t skip = 0; skip < 6; ++skip)
        if (auto const f = fetch(w.here.monitor->where(), {false, 0, skip}); f.about.size_bytes > 0) order.push_back(f.about.step);
    BOOST_TEST(order == (std::vector<std::uint64_t>{7, 5, 3, 4}), boost::test_tools::per_element());
    // Another monitor that asks gets what is here alone: with peers of one another it would go round.
    BOOST_TEST(fetch(w.here.monitor->where(), {false, 0, 0}, true).about.step == 5u);
}

BOOST_AUTO_TEST_CASE(without_the_peer_a_restart_takes_what_is_here_and_with_nothing_here_it_is_refused) {
    std::optional<workplace> there(std::in_place, false);
    auto const at = there->monitor->where();
    there.reset();
    workplace here(true, [&](auto& o) { o.peer = at; });
    BOOST_CHECK_EXCEPTION(fetch(here.monitor->where(), {false, 0, 0}), std::runtime_error,
                          [](auto const& e) { return has(e.what(), "--fresh") && !has(e.what(), "\n"); });
    auto t = here.trainer(1);
    t.greet();
    saves(t, 1);
    BOOST_TEST(fetch(here.monitor->where(), {false, 0, 0}).about.step == 1u);
}

BOOST_AUTO_TEST_CASE(memory_to_send_with_is_left_beside_blocks_that_come_as_payload_and_a_pool_that_takes_all_is_told_of) {
    {
        two_monitors w([](auto& o) { o.memory_limit_bytes = 32u << 20; });
        auto t = w.here.trainer(0);
        t.greet();
        saves(t, 1);
        BOOST_TEST(w.peer_gets(1));
    }
    two_monitors w([](auto& o) { o.memory_limit_bytes = 26u << 20; });
    auto t = w.here.trainer(2);
    t.greet();
    saves(t, 1);
    BOOST_TEST(w.here.becomes([](auto const& s) { return has(s["peer"]["stores"][0].value("why", ""), "--memory-mb"); }));
}

BOOST_AUTO_TEST_CASE(a_step_that_the_peer_has_of_another_run_is_sent_all_the_same) {
    two_monitors w;
    leave(w.there, {1});
    {
        workplace beside(true, [&](auto& o) {
            o.dir = w.here.folder.path() / "stores";
            o.linger = 0ms;
        });
        leave(beside, {1});
    }
    auto t = w.here.trainer(1);
    BOOST_TEST(t.greet().durable_step == 1u);
    BOOST_TEST(w.here.becomes([](auto const& s) { return s["peer"]["stores"].size() == 1u && s["peer"]["stores"][0]["sent"] == 1; }));
    BOOST_TEST(w.copy()["up_to_date"] == true);
    // And once.
    t.peer.close();
    BOOST_TEST_REQUIRE(w.here.store_is_free());
    auto again = w.here.trainer(1);
    again.greet();
    BOOST_TEST(w.here.becomes([](auto const& s) { return s["peer"]["stores"][0]["connected"] == true; }));
    BOOST_TEST(w.copy()["up_to_date"] == true);
    BOOST_TEST(w.copy()["sent"] == 0);
}

BOOST_AUTO_TEST_CASE(a_run_from_the_beginning_does_not_push_out_what_the_peer_has) {
    two_monitors w;
    leave(w.there, {8, 9});
    auto t = w.here.trainer(1);
    t.greet();
    BOOST_TEST(w.here.becomes([](auto const& s) { return s["peer"]["stores"][0]["connected"] == true; }));
    for (std::uint64_t step : {1, 2, 3}) saves(t, step);
    BOOST_TEST(has(w.copy()["why"].get<std::string>(), "stands at step 9"));
    BOOST_TEST(w.copy()["sent"] == 0);
    BOOST_TEST(std::filesystem::exists(w.there.file(8)));
    saves(t, 10);
    BOOST_TEST_REQUIRE(w.peer_gets(10));
    BOOST_TEST(!w.copy().contains("why"));
}

BOOST_AUTO_TEST_CASE(monitors_that_are_peers_of_one_another_do_not_go_round) {
    std::optional<workplace> there(std::in_place, false);
    auto const at = there->monitor->where();
    there->monitor.reset();
    workplace here(false, [&](auto& o) {
        o.peer = at;
        o.peer_retry = 20ms;
    });
    va::monitor_options o;
    o.dir = there->folder.path() / "stores";
    o.listen = {at};
    o.memory_limit_bytes = 512u << 20;
    o.peer = here.monitor->where();
    there->monitor.emplace(o);
    auto t = here.trainer(0);
    t.greet();
    saves(t, 1);
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].value("durable_step", 0) == 1; }));
    BOOST_TEST(there->status()["peer"]["stores"].empty());
    BOOST_TEST(here.status()["peer"]["stores"].size() == 1u);
}

BOOST_AUTO_TEST_CASE(a_monitor_that_ends_waits_for_its_peer_but_not_for_one_that_is_away) {
    fake_monitor peer;
    {
        workplace here(true, [&](auto& o) { o.peer = peer.where(); });
        auto t = here.trainer(1);
        t.greet();
        auto const connection = peer.accept();
        auto const hello = connection->greet({wire::version, 0, 0, 0, 1u << 30});
        saves(t, 3);
        auto const taken = connection->take_save(hello);
        here.monitor->get().stop();
        std::this_thread::sleep_for(100ms);
        BOOST_TEST(!here.monitor->over());
        connection->finish(taken, 1);
        here.monitor.reset();
    }
    {
        workplace here(true, [&](auto& o) {
            o.peer = peer.where();
            o.peer_farewell = 200ms;
        });
        auto t = here.trainer(1);
        t.greet();
        auto const connection = peer.accept();
        connection->greet({wire::version, 0, 0, 0, 64u << 10});
        saves(t, 3);
        connection->expect<wire::begin>();
        auto const since = std::chrono::steady_clock::now();
        here.monitor.reset();
        BOOST_TEST((std::chrono::steady_clock::now() - since < 20s));
    }
    peer.die();
    workplace here(true, [&](auto& o) { o.peer = peer.where(); });
    auto t = here.trainer(1);
    t.greet();
    saves(t, 3);
    BOOST_TEST(here.becomes([](auto const& s) { return s["peer"]["stores"][0].contains("why"); }));
    auto const since = std::chrono::steady_clock::now();
    here.monitor.reset();
    BOOST_TEST((std::chrono::steady_clock::now() - since < 20s));
}

}  // namespace varve_test
