#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <chrono>
#include <fcntl.h>
#include <future>
#include <optional>
#include <thread>

#include <varve/asio/monitor_sink.hpp>
#include <varve/checkpointer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/staging/host.hpp>

#include "fake_monitor.hpp"
#include "files.hpp"
#include "plain_sinks.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;
using varve::asio::monitor_sink;
using varve::asio::shared_pool;

constexpr std::size_t block = varve::block_unit_bytes;
constexpr std::size_t floats_per_block = block / sizeof(float);
auto const timed_out = std::make_error_code(std::errc::timed_out);

/// A trainer whose checkpoints have three blocks, and the monitor that the test plays.
struct trainer {
    using checkpointer_type = varve::checkpointer<varve::host_staging, varve::async<2>, monitor_sink>;

    explicit trainer(fake_monitor& to, std::size_t pool_blocks = 8, bool shared = true) : monitor(to), blocks(pool_blocks), model(2, floats_per_block) {
        if (shared) pool = std::make_shared<shared_pool>(pool_blocks * block, block);
        options.pool = pool;
        options.files.keep = 3;
        options.connect_limit = 2s;
        options.retry_after = 1ms;
        options.goodbye_limit = 100ms;
    }
    /// The connection of the trainer, once it has said hello and was welcomed.
    std::unique_ptr<fake_connection> start(wire::welcome const& welcome = {}) {
        auto made = std::async(std::launch::async, [this] { make(); });
        auto connection = monitor.accept();
        hello = connection->greet(welcome);
        made.get();
        return connection;
    }
    void make() {
        auto staging = pool ? varve::host_staging(pool->memory(), block, pool) : varve::host_staging(blocks * block, block);
        checkpointer.emplace(model.state(), std::move(staging), varve::async<2>{}, monitor_sink(monitor.where(), "/data/run", options), checkpointer_options);
    }
    varve::ticket save(std::uint64_t step) {
        checkpointer->before_update();
        model.update(step);
        return checkpointer->save(step, {{"loss", std::to_string(step)}});
    }
    std::string file_of(std::uint64_t step) { return checkpoint_bytes(model.state(), {step, 1, {{"loss", std::to_string(step)}}}); }
    bool holds(std::vector<std::byte> const& image, std::uint64_t step) {
        auto const file = file_of(step);
        return image.size() == file.size() && std::memcmp(image.data() + hello.header_bytes, file.data() + hello.header_bytes, file.size() - hello.header_bytes) == 0;
    }

    fake_monitor& monitor;
    std::size_t blocks;
    toy_model model;
    std::shared_ptr<shared_pool> pool;
    varve::asio::monitor_sink_options options;
    varve::checkpointer_options checkpointer_options;
    wire::hello hello;
    std::optional<checkpointer_type> checkpointer;
};

struct at_socket {
    temporary_folder folder;
    fake_monitor monitor{folder.path() / "socket"};
};

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
    while (c->next() != wire::message::commit) {}
    c->say(wire::crash_safe{0});
    c->say(wire::durable{0, 1});
    BOOST_TEST(!ticket.durable().wait_for(20s));
}

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
    for (int i = 0; i < 20'000 && spawned == 0; ++i) std::this_thread::sleep_for(1ms);
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
    auto const save = c->take_save(t.hello);
    c->finish(save, 1);
    BOOST_TEST(!ticket.durable().wait_for(20s));
    BOOST_TEST(t.holds(save.image, 6));
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

BOOST_FIXTURE_TEST_CASE(a_save_that_is_not_wanted_any_more_is_abandoned, at_socket) {
    toy_model model(1, 1000);
    varve::safetensors format;
    auto const img = format.lay_out(model.state());
    auto pool = std::make_shared<shared_pool>(2 * block, block);
    varve::host_staging staging(pool->memory(), block, pool);
    monitor_sink sink(monitor.where(), "/data/run", {.pool = pool});
    BOOST_TEST(sink.register_memory(staging.regions()[0]) == 0);
    BOOST_TEST(!sink.takes_digests());
    auto introduced = std::async(std::launch::async, [&] { sink.introduce({model.state(), img, format.extension(), block, 1, varve::when_busy::block}); });
    auto const c = monitor.accept();
    c->greet();
    introduced.get();
    auto buffer = staging.acquire({});
    auto const name = [&](std::uint64_t step) { return varve::open_request{-1, {}, img.size_bytes, step}; };
    {
        auto target = sink.open(name(3));
        static std::atomic<int> came = 0;
        target.write(img.header_bytes, {buffer.data(), 100, varve::memory_kind::host, 0}, {[](void*, std::error_code) noexcept { ++came; }, nullptr}, buffer.lend());
        BOOST_TEST(came == 1);
        // What is not on loan might be another block's by the time that the monitor reads it.
        static std::error_code refused;
        target.write(img.header_bytes, {buffer.data(), 100, varve::memory_kind::host, 0}, {[](void*, std::error_code ec) noexcept { refused = ec; }, nullptr});
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

BOOST_FIXTURE_TEST_CASE(a_monitor_that_falls_silent_is_lost, at_socket) {
    trainer t(monitor, 3);
    t.options.silence_limit = 100ms;
    auto c = t.start();
    std::this_thread::sleep_for(150ms);  // one that never pings is not missed
    auto first = t.save(1);
    c->take_save(t.hello);
    c->say(wire::ping{});
    c->expect<wire::pong>();
    BOOST_TEST(first.durable().wait_for(20s) == errc::monitor_lost);
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
