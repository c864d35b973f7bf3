#include <boost/test/unit_test.hpp>

#include <fstream>

#include "comes_to.hpp"
#include "monitor_workplace.hpp"
#include "support.hpp"
#include "test_certificates.hpp"
#include "varve/store.hpp"

namespace varve_test {

BOOST_FIXTURE_TEST_CASE(a_save_by_reference_becomes_crash_safe_and_then_durable, welcomed_trainer<1>) {
    BOOST_TEST(welcome.durable_step == 0u);
    t.save(1, 7);
    BOOST_TEST(t.peer.expect<wire::crash_safe>().save == 1u);
    auto const durable = t.peer.expect<wire::durable>();
    BOOST_TEST(durable.save == 1u);
    BOOST_TEST(durable.sequence == 1u);
    // A pool of one image: everything is given back as it is written.
    BOOST_TEST(t.peer.released == t.plans.size());
    BOOST_TEST(t.holds(file(7), 7));
    varve::file_descriptor fd(::open(file(7).c_str(), O_RDONLY), varve::system_calls::kernel());
    BOOST_TEST(varve::safetensors().identify(fd.get()).metadata.at("who") == "test");
}

BOOST_AUTO_TEST_CASE(a_save_by_payload_is_checked_and_committed) {
    for (bool unix_socket : {true, false}) {
        workplace w(unix_socket);
        auto t = w.trainer(0);
        auto const welcome = t.greet();
        BOOST_TEST(welcome.credit_bytes >= t.layout.size_bytes);
        for (std::uint64_t step : {1, 2, 3}) {
            t.save(step, step);
            BOOST_TEST(t.peer.expect<wire::crash_safe>().save == step);
            BOOST_TEST(t.peer.expect<wire::durable>().save == step);
        }
        BOOST_TEST(t.holds(w.file(3), 3));
        // The newest is kept, and what it takes is not given back.
        while (t.peer.credit < welcome.credit_bytes - t.layout.data_bytes()) t.peer.expect<wire::credit>();
    }
}

BOOST_AUTO_TEST_CASE(a_save_over_tls_is_committed) {
    test_certificates files;
    if (!files.usable()) return;
    workplace w(false, [&](auto& o) { o.tls = files.load("server", true); });
    auto t = w.trainer(0, "run", files.load("client", false));
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    BOOST_TEST(t.holds(w.file(1), 1));
}

BOOST_FIXTURE_TEST_CASE(bytes_that_changed_on_the_way_are_no_checkpoint, welcomed_trainer<0>) {
    t.set(1);
    t.begin(1, 1);
    t.send_blocks(1);
    auto digests = t.digests();
    digests[5] ^= 1;
    t.peer.send(wire::commit{1, {}, digests});
    BOOST_TEST((t.peer.expect<wire::failed>().code == varve::errc::not_whole));
    t.save(2, 2);
    t.peer.expect<wire::durable>();
    BOOST_TEST(!std::filesystem::exists(file(1)));
    BOOST_TEST(t.holds(file(2), 2));
}

BOOST_AUTO_TEST_CASE(a_trainer_that_vanishes_after_its_commit_loses_nothing) {
    for (std::size_t images : {0, 1, 2}) {
        workplace w;
        auto t = w.trainer(images);
        t.greet();
        t.save(1, 1);
        t.peer.expect<wire::durable>();
        t.save(2, 2, images == 2 ? 1 : 0);
        t.peer.close();
        BOOST_TEST(w.store_is_free());
        BOOST_TEST(t.holds(w.file(2), 2));
        BOOST_TEST(t.holds(w.file(1), 1));
    }
}

BOOST_FIXTURE_TEST_CASE(what_a_trainer_sent_that_hears_nothing_any_more_is_taken_all_the_same, welcomed_trainer<2>) {
    t.peer.stop_listening();
    t.save(1, 1);
    // By then the monitor had words for it in vain.
    BOOST_TEST_REQUIRE(becomes([&](auto const& s) { return s["stores"][0].value("crash_safe_step", 0) == 1; }));
    t.save(2, 2, 1);
    t.peer.close();
    BOOST_TEST(store_is_free());
    BOOST_TEST(t.holds(file(2), 2));
}

BOOST_FIXTURE_TEST_CASE(a_trainer_that_hears_nothing_and_stays_is_let_go, welcomed_trainer<2>) {
    t.peer.stop_listening();
    t.save(1, 1);
    BOOST_TEST(store_is_free());
    BOOST_TEST(t.holds(file(1), 1));
}

BOOST_AUTO_TEST_CASE(a_trainer_that_vanishes_before_its_commit_leaves_the_store_clean) {
    for (std::size_t images : {0, 1}) {
        workplace w;
        auto t = w.trainer(images);
        t.greet();
        t.save(1, 1);
        t.peer.expect<wire::durable>();
        t.set(2);
        t.begin(2, 2);
        for (std::size_t i = 0; i + 1 < t.plans.size(); ++i) t.send_block(2, i, i);
        t.peer.close();
        BOOST_TEST(w.store_is_free());
        BOOST_TEST(!std::filesystem::exists(w.file(2)));
        BOOST_TEST(t.holds(w.file(1), 1));
        // Whoever comes next finds a store that it can write.
        auto next = w.trainer(images);
        BOOST_TEST(next.greet().durable_step == 1u);
        next.save(1, 2);
        next.peer.expect<wire::durable>();
        BOOST_TEST(next.holds(w.file(2), 2));
    }
}

BOOST_AUTO_TEST_CASE(a_second_trainer_of_the_same_store_is_refused_and_the_first_goes_on) {
    workplace w;
    auto first = w.trainer(1);
    first.greet();
    auto second = w.trainer(1);
    second.peer.send(second.hello, {second.memory.get()});
    BOOST_TEST(has(second.peer.refusal(), "another process is writing to this store"));
    auto other = w.trainer(1, "other");
    other.greet();
    first.save(1, 1);
    other.save(1, 5);
    first.peer.expect<wire::durable>();
    other.peer.expect<wire::durable>();
    BOOST_TEST(first.holds(w.file(1), 1));
    BOOST_TEST(other.holds(w.file(5, "other"), 5));
}

BOOST_AUTO_TEST_CASE(a_store_that_another_process_locks_is_refused) {
    workplace w;
    auto t = w.trainer(1);
    varve::store held(w.folder.path() / "stores/run", varve::safetensors(), t.s, t.layout.size_bytes);
    t.peer.send(t.hello, {t.memory.get()});
    BOOST_TEST(has(t.peer.refusal(), "another process is writing"));
    BOOST_TEST(w.store_is_free());
}

BOOST_AUTO_TEST_CASE(a_pool_over_the_cap_is_refused_in_one_line) {
    for (std::size_t images : {0, 4}) {
        workplace w(true, [](auto& o) { o.memory_limit_bytes = 6u << 20; });
        auto t = w.trainer(images);
        t.peer.send(t.hello, images > 0 ? std::vector<int>{t.memory.get()} : std::vector<int>{});
        auto const why = t.peer.refusal();
        BOOST_TEST(has(why, "--memory-mb"), why);
        BOOST_TEST(!has(why, "\n"));
    }
}

BOOST_AUTO_TEST_CASE(memory_is_given_back_with_its_trainer) {
    workplace w(true, [](auto& o) { o.linger = 0ms; });
    {
        auto t = w.trainer(2);
        t.greet();
        BOOST_TEST(w.status()["memory_used_bytes"] == t.pool_bytes);
    }
    BOOST_TEST(w.becomes([](auto const& s) { return s["memory_used_bytes"] == 0; }));
}

BOOST_AUTO_TEST_CASE(no_shared_memory_of_a_trainer_is_left) {
    workplace w(true, [](auto& o) { o.linger = 200ms; });
    auto const before = shared_memories();
    for (bool crash_safe : {false, true}) {
        auto t = w.trainer(2);
        t.greet();
        t.set(1);
        t.begin(1, 1);
        t.send_blocks(1);
        if (crash_safe) {
            t.commit(1);
            t.peer.expect<wire::crash_safe>();
        }
        BOOST_TEST(shared_memories() > before);
    }
    BOOST_TEST(w.becomes([&](auto const& s) { return s["stores"].empty() && !s.contains("lingering") && shared_memories() == before; }));
}

BOOST_AUTO_TEST_CASE(with_replace_the_newest_wins) {
    workplace w;
    auto t = w.trainer(3);
    t.hello.busy = varve::when_busy::replace;
    t.greet();
    constexpr std::uint64_t saves = 12;
    // As fast as they can be handed over: each crash-safe, and of those that wait the newest is written next.
    for (std::uint64_t i = 1; i <= saves; ++i) t.save(i, i, t.free_image());
    while (t.peer.expect<wire::durable>().save != saves) {
    }
    auto const store = w.status()["stores"][0];
    std::size_t const durable = store["durable"], replaced = store["replaced"];
    BOOST_TEST(durable + replaced == saves);
    BOOST_TEST(t.holds(w.file(saves), saves));
    if (replaced > 0) BOOST_TEST((t.peer.failure->code == varve::errc::replaced));
}

BOOST_AUTO_TEST_CASE(the_newest_checkpoint_lingers_in_memory_and_is_fetched_from_there) {
    for (bool unix_socket : {true, false}) {
        workplace w(unix_socket, [](auto& o) { o.linger = 20s; });
        auto t = w.trainer(unix_socket ? 2 : 0);
        t.greet();
        for (std::uint64_t step : {1, 2}) {
            t.save(step, step, step % 2);
            t.peer.expect<wire::durable>();
        }
        t.peer.close();
        auto next = w.trainer(unix_socket ? 2 : 0);
        BOOST_TEST(next.greet().memory_step == 2u);
        std::vector<std::pair<std::uint64_t, bool>> found;
        for (std::uint32_t skip = 0; skip < 5; ++skip) {
            next.peer.send(wire::fetch{false, 0, skip});
            auto const image = next.peer.expect<wire::image>();
            if (image.size_bytes == 0) break;
            found.emplace_back(image.step, image.in_memory);
            varve::file_descriptor fd;
            if (unix_socket) {
                auto along = next.peer.descriptors();
                BOOST_TEST_REQUIRE(along.size() == 1u);
                fd = std::move(along[0]);
                BOOST_TEST((::fcntl(fd.get(), F_GETFL) & O_ACCMODE) == O_RDONLY);
            } else {
                fd = {::memfd_create("t", MFD_CLOEXEC), varve::system_calls::kernel()};
                for (std::uint64_t at = 0; at < image.size_bytes;) {
                    auto const piece = next.peer.expect<wire::image_data>();
                    BOOST_TEST_REQUIRE(piece.offset == at);
                    BOOST_TEST_REQUIRE(::pwrite(fd.get(), piece.bytes.data(), piece.bytes.size(), static_cast<off_t>(at)) ==
                                       static_cast<ssize_t>(piece.bytes.size()));
                    at += piece.bytes.size();
                }
            }
            BOOST_TEST(next.holds(fd.get(), image.step));
        }
        // The one in memory, the same on disk, the one before.
        BOOST_TEST((found == std::vector<std::pair<std::uint64_t, bool>>{{2, true}, {2, false}, {1, false}}));
        // With the next durable one it has done its work.
        next.save(1, 3);
        next.peer.expect<wire::durable>();
        BOOST_TEST(w.becomes([](auto const& s) { return !s.contains("lingering"); }));
    }
}

BOOST_AUTO_TEST_CASE(what_lingers_is_byte_for_byte_the_file) {
    workplace w(true, [](auto& o) { o.linger = 10min; });
    auto t = w.trainer(2);
    t.greet();
    t.save(1, 4);
    t.peer.expect<wire::durable>();
    t.peer.close();
    BOOST_TEST_REQUIRE(w.becomes([](auto const& s) { return s.contains("lingering"); }));
    BOOST_TEST(w.status()["memory_used_bytes"] == t.layout.size_bytes);
    raw_peer fetching(w.monitor->where());
    BOOST_TEST(fetching.greet(wire::purpose::fetch).memory_step == 4u);
    fetching.send(wire::fetch{true, 4, 0});
    BOOST_TEST(fetching.expect<wire::image>().in_memory);
    auto const memory = fetching.descriptors();
    BOOST_TEST_REQUIRE(memory.size() == 1u);
    std::vector<char> a(t.layout.size_bytes), b(t.layout.size_bytes);
    BOOST_TEST_REQUIRE(::pread(memory[0].get(), a.data(), a.size(), 0) == static_cast<ssize_t>(a.size()));
    std::ifstream(w.file(4), std::ios::binary).read(b.data(), static_cast<std::streamsize>(b.size()));
    BOOST_TEST((a == b));
}

BOOST_AUTO_TEST_CASE(what_lingers_goes_in_time_and_is_fetched_from_disk_then) {
    std::atomic<bool> lingered = false;
    workplace w(true, [&](auto& o) {
        o.linger = 200ms;
        o.log = [&](std::string const& line) {
            if (has(line, "the checkpoint of step 4 lingers in memory")) lingered = true;
        };
    });
    auto t = w.trainer(2);
    t.greet();
    t.save(1, 4);
    t.peer.expect<wire::durable>();
    t.peer.close();
    BOOST_TEST_REQUIRE(
        w.becomes([&](auto const& s) { return lingered && s["stores"].empty() && !s.contains("lingering") && s["memory_used_bytes"] == 0; }));
    auto next = w.trainer(2);
    next.greet();
    next.peer.send(wire::fetch{false, 0, 0});
    auto const from_disk = next.peer.expect<wire::image>();
    BOOST_TEST(!from_disk.in_memory);
    BOOST_TEST(from_disk.step == 4u);
}

BOOST_FIXTURE_TEST_CASE(a_trainer_that_comes_back_waits_for_what_it_left, welcomed_trainer<1>) {
    t.save(1, 1);
    t.peer.close();
    auto next = trainer(1);
    BOOST_TEST(next.greet().durable_step == 1u);
}

BOOST_FIXTURE_TEST_CASE(stop_finishes_what_is_crash_safe_and_removes_the_socket, welcomed_trainer<1>) {
    auto const at = monitor->where();
    t.save(1, 9);
    t.peer.expect<wire::crash_safe>();
    monitor->get().stop();
    BOOST_TEST(has(t.peer.refusal(), "the monitor is ending"));
    monitor.reset();
    BOOST_TEST(!std::filesystem::exists(at.path));
    BOOST_TEST(t.holds(file(9), 9));
}

BOOST_AUTO_TEST_CASE(of_a_monitor_that_has_ended_nothing_is_left) {
    auto const held = std::make_shared<int>();
    {
        workplace w(true, [&](auto& o) { o.log = [held](auto const&) {}; });
        auto t = w.trainer(2);
        t.greet();
        t.save(1, 1);
        t.peer.expect<wire::durable>();
    }
    BOOST_TEST(held.use_count() == 1);
}

BOOST_AUTO_TEST_CASE(a_monitor_for_once_ends_with_its_trainer) {
    workplace w(true, [](auto& o) {
        o.once = true;
        o.linger = 200ms;
    });
    {
        auto t = w.trainer(2);
        t.greet();
        t.save(1, 1);
        t.peer.expect<wire::durable>();
    }
    BOOST_TEST(comes_to([&] { return w.monitor->over(); }));
}

BOOST_FIXTURE_TEST_CASE(an_abandoned_save_is_answered_once_its_blocks_are_free, welcomed_trainer<2>) {
    t.set(1);
    t.begin(1, 1);
    t.send_block(1, 0, 0);
    t.peer.send(wire::abandon{1});
    auto const failed = t.peer.expect<wire::failed>();
    BOOST_TEST((failed.code == varve::errc::cancelled));
    BOOST_TEST(t.peer.released == 1u);
    t.save(2, 2);
    t.peer.expect<wire::durable>();
    BOOST_TEST(t.holds(file(2), 2));
}

BOOST_FIXTURE_TEST_CASE(metadata_without_room_fails_its_save_alone, welcomed_trainer<1>) {
    t.set(1);
    t.begin(1, 1);
    t.send_blocks(1);
    t.peer.send(wire::commit{1, {{"long", std::string(10'000, 'x')}}, {}});
    BOOST_TEST((t.peer.expect<wire::failed>().code == varve::errc::metadata_too_large));
    while (t.peer.released < t.plans.size()) t.peer.expect<wire::release>();
    t.save(2, 2);
    t.peer.expect<wire::durable>();
}

BOOST_FIXTURE_TEST_CASE(the_status_tells_of_trainers_bytes_and_steps, welcomed_trainer<2>) {
    t.save(1, 3);
    t.peer.expect<wire::durable>();
    raw_peer asking(monitor->where());
    asking.greet(wire::purpose::status);
    asking.send(wire::status{});
    auto const status = nlohmann::json::parse(asking.expect<wire::status_reply>().json);
    BOOST_TEST(status["memory_used_bytes"] == t.pool_bytes);
    auto const& store = status["stores"].at(0);
    BOOST_TEST(store["trainer"] == true);
    BOOST_TEST(store["crash_safe_step"] == 3);
    BOOST_TEST(store["durable_step"] == 3);
    BOOST_TEST(store["held_bytes"] == t.layout.data_bytes());
    BOOST_TEST(store["in_flight"] == 0);
    BOOST_TEST(store["write_gb_per_s"].get<double>() > 0);
}

}  // namespace varve_test
