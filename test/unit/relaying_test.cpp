#include <boost/test/unit_test.hpp>

#include <chrono>
#include <future>
#include <thread>
#include <vector>

#include <varve/checkpointer.hpp>
#include <varve/observer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/scheduling/layerwise.hpp>
#include <varve/scheduling/sync.hpp>
#include <varve/sink/memory.hpp>
#include <varve/staging/host.hpp>

#include "plain_sinks.hpp"
#include "relaying_run.hpp"
#include "relaying_sink.hpp"
#include "support.hpp"
#include "toy_run.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;

auto const timed_out = std::make_error_code(std::errc::timed_out);

}  // namespace

BOOST_AUTO_TEST_SUITE(relaying)

BOOST_AUTO_TEST_CASE(a_save_is_crash_safe_before_it_is_durable) {
    run r;
    auto t = r.save(1);
    BOOST_REQUIRE(r.other->was_handed(0));
    BOOST_TEST(!t.staged().wait_for(30s));
    BOOST_TEST(t.crash_safe().wait_for(10ms) == timed_out);
    BOOST_TEST(!t.written().ready());
    r.other->say_crash_safe(0);
    BOOST_TEST(!t.crash_safe().wait_for(30s));
    BOOST_TEST(t.written().ready());
    BOOST_TEST(t.durable().wait_for(10ms) == timed_out);
    r.other->say_durable(0);
    BOOST_TEST(!t.durable().wait_for(30s));
    r.checkpointer->drain();
    BOOST_TEST(r.seen.at("staged 1") < r.seen.at("written 1"));
    BOOST_TEST(r.seen.at("written 1") < r.seen.at("crash_safe 1"));
    BOOST_TEST(r.seen.at("crash_safe 1") < r.seen.at("durable 1"));
    BOOST_TEST(r.other->gone(0));
}

BOOST_AUTO_TEST_CASE(the_receiver_gets_every_byte_the_values_and_the_digests) {
    run r;
    auto t = r.save(7);
    BOOST_REQUIRE(r.other->was_handed(0));
    varve::safetensors format;
    auto const img = format.lay_out(r.model.state());
    auto const whole = checkpoint_bytes(r.model.state(), {7, 1, {{"loss", "7"}}});
    auto& save = *r.other->saves.at(0);
    BOOST_TEST(save.values.step == 7u);
    BOOST_TEST(save.values.metadata.at("loss") == "7");
    BOOST_REQUIRE(save.bytes.size() == whole.size());
    BOOST_TEST(std::memcmp(save.bytes.data() + img.header_bytes, whole.data() + img.header_bytes, img.data_bytes()) == 0);
    auto const header = format.header(r.model.state(), img, {7, 1, {{"loss", "7"}}}, save.digests);
    BOOST_TEST(std::memcmp(header.data(), whole.data(), header.size()) == 0);
    BOOST_TEST(r.other->introduced == std::vector<std::string>{".safetensors " + std::to_string(img.size_bytes) + " " + std::to_string(block)});
    BOOST_TEST(r.other->in_flight == 2u);
    r.other->say_crash_safe(0);
    r.other->say_durable(0);
    BOOST_TEST(!t.durable().wait_for(30s));
}

BOOST_AUTO_TEST_CASE(a_receiver_that_hashes_gets_no_digests) {
    auto to = std::make_shared<receiver>();
    to->takes_digests = false;
    run r({}, 8, varve::async<2>{}, to);
    r.save(1);
    BOOST_REQUIRE(to->was_handed(0));
    BOOST_TEST(to->saves.at(0)->digests.empty());
    to->say_crash_safe(0);
    to->say_durable(0);
}

BOOST_AUTO_TEST_CASE(answers_may_come_in_any_order_among_saves) {
    run<varve::async<3>> r({}, 16);
    std::vector<varve::ticket> t;
    for (std::uint64_t step = 1; step <= 3; ++step) t.push_back(r.save(step));
    for (std::size_t i = 0; i < 3; ++i) BOOST_REQUIRE(r.other->was_handed(i));
    for (std::size_t i : {2u, 0u, 1u}) {
        r.other->say_crash_safe(i);
        BOOST_TEST(!t[i].crash_safe().wait_for(30s));
    }
    for (std::size_t i : {1u, 2u, 0u}) {
        BOOST_TEST(!t[i].durable().ready());
        r.other->say_durable(i);
        BOOST_TEST(!t[i].durable().wait_for(30s));
    }
    // Both answers at once, before anybody has looked.
    auto last = r.save(4);
    BOOST_REQUIRE(r.other->was_handed(3));
    r.other->say_crash_safe(3);
    r.other->say_durable(3);
    BOOST_TEST(!last.durable().wait_for(30s));
    BOOST_TEST(last.crash_safe().ready());
    BOOST_TEST((r.seen.at("crash_safe 4") >= 0 && r.seen.at("crash_safe 4") < r.seen.at("durable 4")));
}

BOOST_AUTO_TEST_CASE(a_save_that_the_receiver_fails_harms_no_other) {
    run r;
    auto first = r.save(1);
    BOOST_REQUIRE(r.other->was_handed(0));
    r.other->say_crash_safe(0, errc::monitor_lost);
    r.other->say_durable(0, errc::monitor_lost);
    BOOST_TEST(first.crash_safe().wait_for(30s) == errc::monitor_lost);
    BOOST_TEST(first.durable().wait_for(30s) == errc::monitor_lost);
    BOOST_TEST(first.written().wait_for(30s) == errc::monitor_lost);
    BOOST_TEST(r.seen.at("crash_safe 1") == -1);
    auto second = r.save(2);
    BOOST_REQUIRE(r.other->was_handed(1));
    r.other->say_crash_safe(1);
    r.other->say_durable(1, std::make_error_code(std::errc::no_space_on_device));
    BOOST_TEST((second.durable().wait_for(30s) == std::errc::no_space_on_device));
    BOOST_TEST(!second.crash_safe().wait_for(1s));
    auto third = r.save(3);
    BOOST_REQUIRE(r.other->was_handed(2));
    r.other->say_crash_safe(2);
    r.other->say_durable(2);
    BOOST_TEST(!third.durable().wait_for(30s));
    r.checkpointer->drain();
    BOOST_TEST(r.seen.at("failed 1") >= 0);
    BOOST_TEST(r.seen.at("failed 2") >= 0);
}

BOOST_AUTO_TEST_CASE(a_write_that_fails_ends_the_save_and_its_target) {
    auto to = std::make_shared<receiver>();
    to->on_write = [](std::size_t n) { return n == 1 ? make_error_code(errc::monitor_lost) : std::error_code{}; };
    run r({}, 8, varve::async<2>{}, to);
    BOOST_TEST(r.save(1).durable().wait_for(30s) == errc::monitor_lost);
    BOOST_TEST(to->gone(0));
    BOOST_TEST(!to->saves.at(0)->handed);
    auto t = r.save(2);
    BOOST_REQUIRE(to->was_handed(1));
    to->say_crash_safe(1);
    to->say_durable(1);
    BOOST_TEST(!t.durable().wait_for(30s));
}

BOOST_AUTO_TEST_CASE(with_replace_a_save_leaves_the_window_when_it_is_crash_safe) {
    run<varve::async<1>> r(when(varve::when_busy::replace), 4, varve::async<1>{});
    BOOST_TEST((r.other->busy == varve::when_busy::replace));
    auto first = r.save(1);
    BOOST_REQUIRE(r.other->was_handed(0));
    BOOST_TEST(!r.save(2).taken());
    r.other->say_crash_safe(0);
    BOOST_TEST(!first.crash_safe().wait_for(30s));
    // The window is left a moment after the ticket says so.
    varve::ticket third = r.save(3);
    for (int i = 0; i < 30'000 && !third.taken(); ++i) {
        std::this_thread::sleep_for(1ms);
        third = r.save(3);
    }
    BOOST_REQUIRE(third.taken());
    BOOST_REQUIRE(r.other->was_handed(1));
    r.other->say_crash_safe(1);
    BOOST_TEST(!third.crash_safe().wait_for(30s));
    r.other->say_durable(0, errc::replaced);
    BOOST_TEST(first.durable().wait_for(30s) == errc::replaced);
    BOOST_TEST(!first.crash_safe().wait());
    r.other->say_durable(1);
    BOOST_TEST(!third.durable().wait_for(30s));
    r.checkpointer->drain();
    BOOST_TEST(r.seen.at("replaced 1") >= 0);
    BOOST_TEST(r.seen.at("failed 1") == -1);
}

BOOST_AUTO_TEST_CASE(without_replace_a_save_stays_in_the_window_until_it_is_durable) {
    run<varve::async<1>> r(when(varve::when_busy::skip), 4, varve::async<1>{});
    auto first = r.save(1);
    BOOST_REQUIRE(r.other->was_handed(0));
    r.other->say_crash_safe(0);
    BOOST_TEST(!first.crash_safe().wait_for(30s));
    std::this_thread::sleep_for(5ms);
    BOOST_TEST(!r.save(2).taken());
    r.other->say_durable(0);
    r.checkpointer->drain();
    BOOST_TEST(r.save(3).taken());
    BOOST_REQUIRE(r.other->was_handed(1));
    r.other->say_crash_safe(1);
    r.other->say_durable(1);
}

BOOST_AUTO_TEST_CASE(every_scheduling_relays) {
    // Boost.Test takes checks on one thread at a time: here the answers are counted.
    auto answer_all = [](auto& r, std::size_t n) {
        return std::async(std::launch::async, [&r, n] {
            for (std::size_t i = 0; i < n; ++i) {
                if (!r.other->was_handed(i)) return i;
                r.other->say_crash_safe(i);
                r.other->say_durable(i);
            }
            return n;
        });
    };
    {
        run<varve::sync> r;
        auto answered = answer_all(r, 2);
        BOOST_TEST(!r.save(1).durable().wait());
        BOOST_TEST(!r.save(2).durable().wait());
        BOOST_TEST(answered.get() == 2u);
    }
    for (std::size_t pool : {1u, 2u, 16u}) {
        run<varve::layerwise<2>> r({}, pool);
        auto answered = answer_all(r, 4);
        for (std::uint64_t step = 1; step <= 4; ++step) train_step(*r.checkpointer, r.model, step);
        r.checkpointer->drain();
        BOOST_TEST(answered.get() == 4u);
    }
}

BOOST_AUTO_TEST_CASE(a_run_that_the_receiver_refuses_is_refused_at_once) {
    auto to = std::make_shared<receiver>();
    to->refuses = errc::store_locked;
    BOOST_CHECK_EXCEPTION(run<>({}, 8, varve::async<2>{}, to), varve::error, [](auto const& e) { return e.code() == errc::store_locked; });
}

BOOST_AUTO_TEST_CASE(a_save_without_a_relay_is_crash_safe_when_it_is_committed) {
    toy_model model(2, 100);
    varve::checkpointer<varve::host_staging, varve::async<1>, varve::memory_sink> ck(model.state(), {4 * block, block}, {}, {});
    auto t = ck.save(1);
    BOOST_TEST(!t.durable().wait_for(30s));
    BOOST_TEST(t.crash_safe().ready());
    BOOST_TEST(!t.crash_safe().wait());
}

BOOST_AUTO_TEST_CASE(a_restore_takes_the_newest_that_is_whole) {
    temporary_folder dir;
    run r;
    r.model.update(5);
    auto const good = checkpoint_bytes(r.model.state(), {5, 5, {{"loss", "5"}}});
    r.model.update(6);
    auto broken = checkpoint_bytes(r.model.state(), {6, 6, {}});
    broken.back() = static_cast<char>(broken.back() ^ 1);
    write_file(dir.path() / "good", good);
    write_file(dir.path() / "broken", broken);
    std::size_t asked = 0;
    r.other->on_fetch = [&](std::optional<std::uint64_t> step, std::uint32_t skip) -> std::optional<varve::fetched_checkpoint> {
        ++asked;
        if (step && *step == 6)
            return skip == 0 ? std::optional(varve::fetched_checkpoint{open_file(dir.path() / "broken"), 6, 6, "broken"}) : std::nullopt;
        if (step && *step != 5) return std::nullopt;
        if (step || skip == 1) return varve::fetched_checkpoint{open_file(dir.path() / "good"), 5, 5, "good"};
        if (skip > 1) return std::nullopt;
        return varve::fetched_checkpoint{open_file(dir.path() / "broken"), 6, 6, "broken"};
    };
    r.model.update(9);
    auto restored = r.checkpointer->restore();
    BOOST_REQUIRE(restored.has_value());
    BOOST_TEST(restored->step == 5u);
    BOOST_TEST(restored->metadata.at("loss") == "5");
    BOOST_TEST(restored->path == "good");
    BOOST_TEST(r.model.is_of(5));
    BOOST_TEST(asked == 2u);
    BOOST_TEST(r.seen.at("restored 5") >= 0);
    BOOST_TEST(r.checkpointer->restore(5)->step == 5u);
    for (std::uint64_t step : {6u, 7u})
        BOOST_CHECK_EXCEPTION(r.checkpointer->restore(step), varve::error, [](auto const& e) { return e.code() == errc::no_checkpoint; });
    r.other->on_fetch = [](auto, auto) { return std::nullopt; };
    BOOST_TEST(!r.checkpointer->restore().has_value());
}

BOOST_AUTO_TEST_CASE(a_checkpoint_of_another_model_changes_no_tensor) {
    temporary_folder dir;
    toy_model other(3, 1000);
    write_file(dir.path() / "other", checkpoint_bytes(other.state(), {1, 1, {}}));
    run r;
    r.model.update(4);
    r.other->on_fetch = [&](auto, auto) { return varve::fetched_checkpoint{open_file(dir.path() / "other"), 1, 1, "other"}; };
    BOOST_CHECK_EXCEPTION(r.checkpointer->restore(), varve::error, [](auto const& e) { return e.code() == errc::mismatch; });
    BOOST_TEST(r.model.is_of(4));
}

BOOST_AUTO_TEST_SUITE_END()
