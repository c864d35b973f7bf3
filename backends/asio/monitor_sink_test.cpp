#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <chrono>
#include <future>
#include <optional>
#include <set>
#include <thread>

#include "fake_monitors_trainer.hpp"
#include "varve/scheduling/sync.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;
using varve::asio::monitor_sink;
using varve::asio::shared_pool;

auto const timed_out = std::make_error_code(std::errc::timed_out);

}  // namespace

BOOST_AUTO_TEST_SUITE(monitor_sink_suite)

BOOST_FIXTURE_TEST_CASE(blocks_are_named_and_read_where_they_are, at_socket) {
    trainer t(monitor);
    auto const c = t.start();
    BOOST_TEST(t.hello.store == "/data/run");
    BOOST_TEST(t.hello.layers.size() == 2u);
    BOOST_TEST(t.hello.layers[1].tensors[0].name == "model.l1.weight");
    BOOST_TEST(t.hello.block_bytes == block);
    BOOST_TEST(t.hello.in_flight == 2u);
    BOOST_TEST(t.hello.keep == 3u);
    BOOST_REQUIRE(c->regions.size() == 1u);
    BOOST_TEST(::fcntl(c->descriptors()[0].get(), F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
    auto ticket = t.save(4);
    auto const save = c->take_save(t.hello);
    BOOST_TEST(save.begin.step == 4u);
    BOOST_TEST(save.blocks.size() == 3u);
    BOOST_TEST(save.commit.chunk_digests.empty());
    BOOST_TEST(save.commit.metadata.at("loss") == "4");
    BOOST_TEST(t.holds(save.image, 4));
    BOOST_TEST(ticket.crash_safe().wait_for(10ms) == timed_out);
    c->say(wire::crash_safe{save.begin.save});
    BOOST_TEST(!ticket.crash_safe().wait_for(20s));
    BOOST_TEST(ticket.durable().wait_for(10ms) == timed_out);
    c->say(wire::durable{save.begin.save, 1});
    BOOST_TEST(!ticket.durable().wait_for(20s));
    t.checkpointer.reset();
    c->expect<wire::goodbye>();
    BOOST_TEST(!c->next().has_value());
}

BOOST_FIXTURE_TEST_CASE(a_block_is_filled_again_only_when_the_monitor_has_let_go_of_it, at_socket) {
    trainer t(monitor, 3);
    auto const c = t.start();
    t.save(1);
    auto const first = c->take_save(t.hello);
    c->say(wire::crash_safe{first.begin.save});
    c->say(wire::durable{first.begin.save, 1});
    t.checkpointer->drain();
    t.model.update(2);
    auto second = t.checkpointer->save(2);
    BOOST_TEST(second.staged().wait_for(50ms) == timed_out);
    for (auto const& b : first.blocks) c->say(wire::release{b.region, b.region_offset});
    BOOST_TEST(!second.staged().wait_for(20s));
    auto const save = c->take_save(t.hello);
    BOOST_TEST(t.holds(save.image, 2));
    c->finish(save, 2);
    BOOST_TEST(!second.durable().wait_for(20s));
}

BOOST_AUTO_TEST_CASE(over_tcp_blocks_and_digests_are_sent_within_the_credit) {
    fake_monitor monitor;
    trainer t(monitor, 8, false);
    wire::welcome w;
    w.credit_bytes = block;
    auto const c = t.start(w);
    BOOST_TEST(t.hello.region_bytes.empty());
    auto ticket = t.save(6);
    auto const save = c->take_save(t.hello, true);
    BOOST_TEST(t.holds(save.image, 6));
    varve::safetensors format;
    auto const header = format.header(t.model.state(), format.lay_out(t.model.state()), {6, 1, {{"loss", "6"}}}, save.commit.chunk_digests);
    auto const file = t.file_of(6);
    BOOST_TEST(std::memcmp(header.data(), file.data(), header.size()) == 0);
    c->finish(save, 1);
    BOOST_TEST(!ticket.durable().wait_for(20s));
}

BOOST_AUTO_TEST_CASE(the_last_message_of_a_save_does_not_wait_behind_the_blocks_of_the_next) {
    // A monitor whose memory is full lets nothing go before the save that fills it is whole.
    fake_monitor monitor;
    trainer t(monitor, 8, false);
    t.checkpointer_options.writing_at_once = 2;
    auto const data_bytes = varve::safetensors().lay_out(t.model.state()).data_bytes();
    wire::welcome w;
    w.credit_bytes = data_bytes - 1;
    auto const c = t.start(w);
    auto first = t.save(1), second = t.save(2);
    BOOST_TEST(!second.staged().wait_for(20s));
    std::this_thread::sleep_for(100ms);  // for its blocks to be where they wait to be sent
    c->say(wire::credit{1});
    auto const save = c->take_save(t.hello);
    BOOST_TEST(save.begin.step == 1u);
    t.model.update(1);
    BOOST_TEST(t.holds(save.image, 1));
    c->say(wire::credit{data_bytes});
    c->finish(save, 1);
    auto const next = c->take_save(t.hello);
    BOOST_TEST(next.begin.step == 2u);
    t.model.update(2);
    BOOST_TEST(t.holds(next.image, 2));
    c->finish(next, 2);
    for (auto const& ticket : {first, second}) BOOST_TEST(!ticket.durable().wait_for(20s));
}

BOOST_AUTO_TEST_CASE(a_monitor_that_gives_no_credit_gets_no_more_bytes_but_is_answered) {
    fake_monitor monitor;
    trainer t(monitor, 8, false);
    wire::welcome w;
    w.credit_bytes = block + 100;
    auto const c = t.start(w);
    auto ticket = t.save(1);
    c->expect<wire::begin>();
    auto const first = c->expect<wire::block_data>().bytes.size();
    BOOST_TEST(first <= w.credit_bytes);
    BOOST_TEST(c->says_nothing_for(50ms));
    c->say(wire::ping{});
    c->expect<wire::pong>();
    c->say(wire::credit{2 * block});
    c->expect<wire::block_data>();
    c->say(wire::credit{2 * block});
    while (c->next() != wire::message::commit) {
    }
    c->say(wire::crash_safe{0});
    c->say(wire::durable{0, 1});
    BOOST_TEST(!ticket.durable().wait_for(20s));
}

BOOST_FIXTURE_TEST_CASE(a_run_that_the_monitor_refuses_is_refused_with_its_words, at_socket) {
    trainer t(monitor);
    auto made = std::async(std::launch::async, [&] { t.make(); });
    auto const c = monitor.accept();
    c->expect<wire::hello>();
    c->say(wire::refusal{errc::store_locked, "/data/run: another process is writing to this store"});
    BOOST_CHECK_EXCEPTION(made.get(), varve::error, [](varve::error const& e) {
        return e.code() == errc::store_locked && std::string(e.what()) == "/data/run: another process is writing to this store";
    });
    monitor.die();
    BOOST_CHECK_EXCEPTION(t.make(), varve::error, [](varve::error const& e) { return e.code() == errc::monitor_lost; });
}

BOOST_FIXTURE_TEST_CASE(a_save_that_the_monitor_fails_says_why, at_socket) {
    trainer t(monitor);
    auto const c = t.start();
    auto first = t.save(1);
    auto const full = c->take_save(t.hello);
    for (auto const& b : full.blocks) c->say(wire::release{b.region, b.region_offset});
    c->say(wire::failed{full.begin.save, std::make_error_code(std::errc::no_space_on_device), "no space"});
    BOOST_TEST((first.crash_safe().wait_for(20s) == std::errc::no_space_on_device));
    BOOST_TEST((first.durable().wait_for(20s) == std::errc::no_space_on_device));
    auto second = t.save(2);
    auto const save = c->take_save(t.hello);
    c->say(wire::crash_safe{save.begin.save});
    c->say(wire::failed{save.begin.save, errc::replaced, "replaced"});
    BOOST_TEST(second.durable().wait_for(20s) == errc::replaced);
    BOOST_TEST(!second.crash_safe().wait_for(20s));
}

BOOST_FIXTURE_TEST_CASE(a_trainer_that_drains_says_so_where_saves_wait_for_an_interval, at_socket) {
    trainer t(monitor);
    t.options.durable_interval = 10min;
    t.checkpointer_options.busy = varve::when_busy::replace;
    auto const c = t.start();
    BOOST_TEST(t.hello.durable_interval_ms == 600'000u);
    t.checkpointer->drain();  // of nothing
    t.save(1);
    auto const save = c->take_save(t.hello);
    c->say(wire::crash_safe{save.begin.save});
    auto drained = std::async(std::launch::async, [&] { t.checkpointer->drain(); });
    BOOST_TEST(c->expect<wire::drain>().on);
    BOOST_TEST((drained.wait_for(10ms) == std::future_status::timeout));
    c->say(wire::durable{save.begin.save, 1});
    drained.get();
    BOOST_TEST(!c->expect<wire::drain>().on);
    t.checkpointer.reset();
    c->expect<wire::goodbye>();
}

BOOST_FIXTURE_TEST_CASE(a_sync_save_is_not_held_back_for_an_interval, at_socket) {
    toy_model model(1, 1000);
    auto pool = std::make_shared<shared_pool>(3 * block, block);
    varve::checkpointer_options options;
    options.busy = varve::when_busy::replace;
    using checkpointer = varve::checkpointer<varve::host_staging, varve::sync, monitor_sink>;
    std::optional<checkpointer> ck;
    auto made = std::async(std::launch::async, [&] {
        ck.emplace(model.state(), varve::host_staging(pool->memory(), block, pool), varve::sync{},
                   monitor_sink(monitor.where(), "/data/run", {.pool = pool, .durable_interval = 10min, .goodbye_limit = 100ms}), options);
    });
    auto const c = monitor.accept();
    auto const hello = c->greet();
    made.get();
    auto saved = std::async(std::launch::async, [&] { return ck->save(1); });
    // Two threads say these, in either order.
    std::set<wire::message> said;
    while (!said.contains(wire::message::commit) || !said.contains(wire::message::drain)) said.insert(*c->next());
    c->say(wire::crash_safe{0});
    c->say(wire::durable{0, 1});
    BOOST_TEST(!saved.get().durable().wait());
    BOOST_TEST(!c->expect<wire::drain>().on);
}

BOOST_FIXTURE_TEST_CASE(an_interval_without_replace_is_refused_before_there_is_a_connection, at_socket) {
    trainer t(monitor);
    t.options.durable_interval = 1s;
    BOOST_CHECK_EXCEPTION(t.make(), varve::error, [](varve::error const& e) { return e.code() == std::errc::invalid_argument; });
}

BOOST_FIXTURE_TEST_CASE(a_save_that_is_not_wanted_any_more_is_abandoned, at_socket) {
    toy_model model(1, 1000);
    varve::safetensors format;
    auto const img = format.lay_out(model.state());
    auto pool = std::make_shared<shared_pool>(2 * block, block);
    varve::host_staging staging(pool->memory(), block, pool);
    monitor_sink sink(monitor.where(), "/data/run", {.pool = pool});
    BOOST_TEST(sink.register_memory(staging.regions()[0]) == 0);
    BOOST_TEST(!sink.takes_digests());
    auto introduced =
        std::async(std::launch::async, [&] { sink.introduce({model.state(), img, format.extension(), block, 1, varve::when_busy::block}); });
    auto const c = monitor.accept();
    c->greet();
    introduced.get();
    auto buffer = staging.acquire({});
    auto const name = [&](std::uint64_t step) { return varve::open_request{-1, {}, img.size_bytes, step}; };
    {
        auto target = sink.open(name(3));
        static std::atomic<int> came = 0;
        target.write(img.header_bytes, {buffer.data(), 100, varve::memory_kind::host, 0}, {[](void*, std::error_code) noexcept { ++came; }, nullptr},
                     buffer.lend());
        BOOST_TEST(came == 1);
        // What is not on loan might be another block's by the time that the monitor reads it.
        static std::error_code refused;
        target.write(img.header_bytes, {buffer.data(), 100, varve::memory_kind::host, 0},
                     {[](void*, std::error_code ec) noexcept { refused = ec; }, nullptr});
        BOOST_TEST(refused == errc::unsupported);
    }
    BOOST_TEST(c->expect<wire::begin>().step == 3u);
    BOOST_TEST(c->expect<wire::block_ref>().size == 100u);
    BOOST_TEST(c->expect<wire::abandon>().save == 0u);
    c->say(wire::release{0, 0});
    c->say(wire::failed{0, errc::cancelled, "abandoned"});
    auto again = sink.open(name(4));
    BOOST_TEST(c->expect<wire::begin>().save == 1u);
}

BOOST_FIXTURE_TEST_CASE(a_checkpoint_comes_back_as_a_descriptor, at_socket) {
    trainer t(monitor);
    auto const c = t.start();
    t.model.update(8);
    write_file(folder.path() / "file", t.file_of(8));
    t.model.update(9);
    auto restored = std::async(std::launch::async, [&] { return t.checkpointer->restore(); });
    auto const f = monitor.accept();
    auto const hello = f->greet();
    BOOST_TEST((hello.purpose == wire::purpose::fetch));
    BOOST_TEST(hello.store == "/data/run");
    BOOST_TEST(!f->expect<wire::fetch>().has_step);
    auto const fd = open_file(folder.path() / "file");
    f->say_with(wire::image{8, 1, t.hello.image_bytes, true, "memory"}, fd.get());
    auto const got = restored.get();
    BOOST_REQUIRE(got.has_value());
    BOOST_TEST(got->step == 8u);
    BOOST_TEST(t.model.is_of(8));
    f->expect<wire::goodbye>();
}

BOOST_AUTO_TEST_CASE(over_tcp_a_checkpoint_comes_back_in_pieces) {
    fake_monitor monitor;
    trainer t(monitor, 8, false);
    wire::welcome w;
    w.credit_bytes = 64u << 20;
    auto const c = t.start(w);
    t.model.update(8);
    auto const file = t.file_of(8);
    auto const bytes = std::as_bytes(std::span(file));
    t.model.update(9);
    auto send = [&](std::uint64_t wrong) {
        auto restored = std::async(std::launch::async, [&] { return t.checkpointer->restore(8); });
        auto const f = monitor.accept();
        f->greet();
        BOOST_TEST(f->expect<wire::fetch>().step == 8u);
        f->say(wire::image{8, 1, bytes.size(), false, "disk"});
        for (std::size_t at = 0; at < bytes.size();) {
            auto const n = std::min<std::size_t>(1'000'003, bytes.size() - at);
            f->say(wire::image_data{at + wrong, bytes.subspan(at, n)});
            if (wrong) break;
            at += n;
        }
        return restored.get();
    };
    BOOST_CHECK_EXCEPTION(send(1), varve::error, [](varve::error const& e) { return e.code() == errc::malformed; });
    BOOST_TEST(send(0)->step == 8u);
    BOOST_TEST(t.model.is_of(8));
    auto nothing = std::async(std::launch::async, [&] { return t.checkpointer->restore(); });
    auto const f = monitor.accept();
    f->greet();
    f->expect<wire::fetch>();
    f->say(wire::image{});
    BOOST_TEST(!nothing.get().has_value());
}

BOOST_FIXTURE_TEST_CASE(the_sink_says_how_it_hands_over, at_socket) {
    trainer t(monitor);
    auto const c = t.start();
    BOOST_TEST(t.checkpointer->describe_sink().find("by reference: 1 regions") != std::string::npos);
    // Memory that is not the pool's is sent.
    monitor_sink other(monitor.where(), "/data/other", {.pool = t.pool});
    std::vector<std::byte> memory(100);
    BOOST_TEST(other.register_memory(memory) == varve::unregistered);
    BOOST_TEST(other.takes_digests());
    BOOST_TEST(other.describe().find("blocks are sent") != std::string::npos);
}

BOOST_AUTO_TEST_SUITE_END()
