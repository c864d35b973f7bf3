#include <boost/test/unit_test.hpp>

#include <array>
#include <chrono>
#include <filesystem>
#include <mutex>
#include <thread>
#include <vector>

#include <varve/checkpointer.hpp>
#include <varve/observer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/scheduling/layerwise.hpp>
#include <varve/scheduling/sync.hpp>
#include <varve/staging/host.hpp>

#include "plain_sinks.hpp"
#include "support.hpp"
#include "toy_run.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::errc;
using varve::milestone;

template <class Scheduling>
using checkpointer = varve::checkpointer<varve::host_staging, Scheduling, plain_file_sink>;

/// Events in the order in which they came.
struct recorder {
    struct entry {
        milestone what;
        std::uint64_t step;
        std::string layer;
    };
    void on(varve::event const& e) noexcept {
        std::lock_guard lock(mutex);
        entries.push_back({e.what, e.step, std::string(e.layer)});
    }
    std::size_t count(milestone m) {
        std::lock_guard lock(mutex);
        return static_cast<std::size_t>(std::count_if(entries.begin(), entries.end(), [&](auto const& e) { return e.what == m; }));
    }
    std::mutex mutex;
    std::vector<entry> entries;
};

template <class Scheduling>
void restores_what_was_saved(Scheduling scheduling, std::size_t pool_blocks) {
    temporary_folder dir;
    toy_model model(4, floats_per_block + 333);
    {
        checkpointer<Scheduling> ck(model.state(), {pool_blocks * block, block}, scheduling, plain_file_sink{}, dir.path(), quick_store());
        for (std::uint64_t step = 1; step <= 6; ++step) BOOST_TEST(!train_step(ck, model, step).durable().wait_for(30s));
    }
    toy_model fresh(4, floats_per_block + 333);
    checkpointer<Scheduling> ck(fresh.state(), {pool_blocks * block, block}, scheduling, plain_file_sink{}, dir.path(), quick_store());
    auto restored = ck.restore();
    BOOST_REQUIRE(restored.has_value());
    BOOST_TEST(restored->step == 6u);
    BOOST_TEST(fresh.is_of(6));
    BOOST_TEST(ck.restore(5)->step == 5u);
    BOOST_TEST(fresh.is_of(5));
    BOOST_CHECK_THROW(ck.restore(4), varve::error);
}

/// Saves at every step, overlapping, with a slow sink: whatever is restored is of one step.
template <class Scheduling>
void never_mixes_steps(Scheduling scheduling, std::size_t pool_blocks, std::size_t writing_at_once) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->delay = 3ms;
    toy_model model(6, floats_per_block / 2 + 17);
    varve::checkpointer_options options;
    options.writing_at_once = writing_at_once;
    std::uint64_t const steps = varve_test::full() ? 60 : 12;
    {
        checkpointer<Scheduling> ck(model.state(), {pool_blocks * block, block}, scheduling, plain_file_sink(control), dir.path(), quick_store(1000),
                                    options);
        for (std::uint64_t step = 1; step <= steps; ++step) train_step(ck, model, step, step % 3 != 0);
        ck.drain();
    }
    checkpointer<Scheduling> ck(model.state(), {pool_blocks * block, block}, scheduling, plain_file_sink(control), dir.path(), quick_store(1000));
    auto saved = ck.files().checkpoints();
    BOOST_TEST(saved.size() == steps - steps / 3);
    for (auto const& c : saved) {
        ck.restore(c.step);
        BOOST_TEST(model.is_of(c.step), "step " << c.step);
    }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(checkpointer_suite)

BOOST_AUTO_TEST_CASE(each_scheduling_restores_what_it_saved) {
    for (std::size_t blocks : {1, 2, 16}) {
        restores_what_was_saved(varve::sync{}, blocks);
        restores_what_was_saved(varve::async<2>{}, blocks);
        restores_what_was_saved(varve::async<varve::dynamic>{3}, blocks);
        restores_what_was_saved(varve::layerwise<2>{}, blocks);
    }
}

BOOST_AUTO_TEST_CASE(no_checkpoint_mixes_two_steps) {
    for (std::size_t blocks : {1, 2, 64}) {
        never_mixes_steps(varve::async<4>{}, blocks, 4);
        never_mixes_steps(varve::async<4>{}, blocks, 1);
        never_mixes_steps(varve::layerwise<3>{}, blocks, 1);
    }
}

BOOST_AUTO_TEST_CASE(a_layerwise_save_writes_before_the_last_layer_is_updated) {
    temporary_folder dir;
    toy_model model(4, 2 * floats_per_block);
    recorder seen;
    varve::checkpointer_options options;
    options.observers.add(seen);
    for (std::size_t blocks : {2, 64}) {
        seen.entries.clear();
        checkpointer<varve::layerwise<1>> ck(model.state(), {blocks * block, block}, {}, plain_file_sink{}, dir.path(), quick_store(), options);
        ck.begin(1);
        for (std::size_t l = 0; l < 4; ++l) {
            ck.before_update(l);
            if (l == 3)
                for (int i = 0; i < 30'000 && seen.count(milestone::write) == 0; ++i) std::this_thread::sleep_for(1ms);
            BOOST_TEST((l < 3 || seen.count(milestone::write) > 0));
            model.update(l, 1);
            ck.layer_ready(l);
        }
        BOOST_TEST(!ck.seal().durable().wait());
    }
}

BOOST_AUTO_TEST_CASE(what_is_announced_out_of_order_is_saved_all_the_same) {
    temporary_folder dir;
    toy_model model(4, floats_per_block);
    checkpointer<varve::layerwise<1>> ck(model.state(), {2 * block, block}, {}, plain_file_sink{}, dir.path(), quick_store());
    ck.begin(1);
    for (std::size_t l : {3, 1, 2}) {
        ck.before_update(l);
        model.update(l, 1);
        ck.layer_ready(l);
    }
    ck.before_update(0);
    model.update(0, 1);
    BOOST_TEST(!ck.seal().durable().wait());
    model.update(9);
    ck.restore();
    BOOST_TEST(model.is_of(1));
}

BOOST_AUTO_TEST_CASE(calls_that_have_no_meaning_are_refused) {
    temporary_folder dir;
    toy_model model;
    checkpointer<varve::layerwise<2>> ck(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store());
    auto is_out_of_order = [](varve::error const& e) { return e.code() == errc::out_of_order; };
    BOOST_CHECK_EXCEPTION(ck.seal(), varve::error, is_out_of_order);
    BOOST_CHECK_THROW(ck.begin(0), varve::error);
    auto ticket = ck.begin(1);
    BOOST_CHECK(ticket.staged().wait() == errc::not_sealed);
    BOOST_CHECK_EXCEPTION(ck.begin(2), varve::error, is_out_of_order);
    BOOST_CHECK_EXCEPTION(ck.restore(), varve::error, is_out_of_order);
    ck.layer_ready(0);
    BOOST_CHECK_EXCEPTION(ck.layer_ready(0), varve::error, is_out_of_order);
    BOOST_CHECK_EXCEPTION(ck.before_update(0), varve::error, is_out_of_order);
    ck.seal();
    BOOST_TEST(!ticket.durable().wait());
}

BOOST_AUTO_TEST_CASE(a_hook_never_changes_what_an_earlier_save_still_reads) {
    temporary_folder dir;
    toy_model model(2, floats_per_block);
    std::uint64_t counter = 0, mirror = 0;
    model.state().layers.push_back({"run", {{"user.counter", varve::dtype::U64, {}, &mirror, {}}}});
    model.state().refresh = [&](std::size_t layer) {
        if (layer == 2) mirror = counter;
    };
    auto control = std::make_shared<sink_control>();
    control->delay = 30ms;
    checkpointer<varve::async<2>> ck(model.state(), {2 * block, block}, {}, plain_file_sink(control), dir.path(), quick_store());
    for (counter = 1; counter <= 2; ++counter) {
        ck.begin(counter);
        for (std::size_t l : {0, 1}) {
            ck.before_update(l);
            model.update(l, counter);
            ck.layer_ready(l);
        }
        ck.seal();
    }
    ck.drain();
    model.state().refresh = {};
    for (std::uint64_t step : {1, 2}) {
        ck.restore(step);
        BOOST_TEST(mirror == step);
    }
}

BOOST_AUTO_TEST_CASE(a_hook_that_throws_loses_its_save_and_nothing_else) {
    temporary_folder dir;
    toy_model model;
    bool broken = true;
    model.state().refresh = [&](std::size_t layer) {
        if (broken && layer == 2) throw std::runtime_error("resized");
    };
    checkpointer<varve::async<1>> ck(model.state(), {4 * block, block}, {}, plain_file_sink{}, dir.path(), quick_store());
    auto lost = ck.begin(1);
    BOOST_CHECK_THROW(ck.seal(), std::runtime_error);
    BOOST_CHECK(lost.durable().wait() == errc::state_changed);
    broken = false;
    BOOST_TEST(!train_step(ck, model, 2).durable().wait());
}

BOOST_AUTO_TEST_CASE(a_layer_that_moved_is_an_error_where_it_is_announced) {
    temporary_folder dir;
    toy_model model;
    bool moved = true;
    model.state().recheck = [&](std::size_t layer) { return moved && layer == 1 ? make_error_code(errc::state_changed) : std::error_code(); };
    auto const says_so = [](auto const& e) { return e.code() == errc::state_changed; };
    checkpointer<varve::sync> ck(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store());
    auto lost = ck.begin(1);
    BOOST_CHECK_EXCEPTION(ck.seal(), varve::error, says_so);
    BOOST_CHECK(lost.durable().wait() == errc::state_changed);

    lost = ck.begin(2);
    ck.layer_ready(0);
    BOOST_CHECK_EXCEPTION(ck.layer_ready(1), varve::error, says_so);
    moved = false;
    ck.seal();
    BOOST_CHECK(lost.durable().wait() == errc::state_changed);
    BOOST_TEST(!train_step(ck, model, 3).durable().wait());
    BOOST_TEST(ck.restore()->step == 3u);
    // Nor is anything read to where it was.
    model.update(4);
    moved = true;
    BOOST_CHECK_EXCEPTION(ck.restore(), varve::error, says_so);
    BOOST_TEST(model.is_of(4));
}

BOOST_AUTO_TEST_CASE(files_that_nothing_makes_durable_are_refused_where_saves_say_that_they_are) {
    temporary_folder dir;
    toy_model model;
    auto files = quick_store();
    files.durable = false;
    BOOST_CHECK_EXCEPTION((checkpointer<varve::sync>(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), files)), varve::error,
                          [](auto const& e) { return e.code() == errc::unsupported; });
    BOOST_TEST(std::filesystem::is_empty(dir.path()));
}

BOOST_AUTO_TEST_CASE(one_save_writes_at_once_at_least) {
    temporary_folder dir;
    toy_model model;
    varve::checkpointer_options options;
    options.writing_at_once = 0;
    checkpointer<varve::sync> ck(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store(), options);
    BOOST_TEST(!train_step(ck, model, 1).durable().wait());
}

BOOST_AUTO_TEST_CASE(a_batch_limits_what_a_save_holds) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->door.close();
    toy_model model(4, floats_per_block);
    recorder seen;
    varve::checkpointer_options options;
    options.batch_bytes = 2 * block;
    options.observers.add(seen);
    checkpointer<varve::async<1>> ck(model.state(), {16 * block, block}, {}, plain_file_sink(control), dir.path(), quick_store(), options);
    auto ticket = train_step(ck, model, 1);
    std::this_thread::sleep_for(50ms);
    BOOST_TEST(seen.count(milestone::write) <= 2u);
    control->door.open();
    BOOST_TEST(!ticket.durable().wait());
    BOOST_TEST(seen.count(milestone::write) == 5u);
}

BOOST_AUTO_TEST_CASE(a_failed_write_loses_its_save_and_nothing_else) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    toy_model model(4, floats_per_block);
    for (int nth = 0; nth < 6; ++nth) {
        auto at = dir.path() / std::to_string(nth);
        checkpointer<varve::layerwise<2>> ck(model.state(), {3 * block, block}, {}, plain_file_sink(control), at, quick_store());
        BOOST_TEST(!train_step(ck, model, 1).durable().wait());
        control->fail_after = nth;
        BOOST_CHECK(train_step(ck, model, 2).durable().wait() == std::errc::io_error);
        control->fail_after = -1;
        BOOST_TEST(ck.restore()->step == 1u);
        BOOST_TEST(model.is_of(1));
        BOOST_TEST(!train_step(ck, model, 2).durable().wait());
        model.update(9);
        BOOST_TEST(ck.restore()->step == 2u);
        BOOST_TEST(model.is_of(2));
    }
}

BOOST_AUTO_TEST_CASE(metadata_that_does_not_fit_fails_its_save_before_a_byte_is_written) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    toy_model model;
    checkpointer<varve::async<2>> ck(model.state(), {4 * block, block}, {}, plain_file_sink(control), dir.path(), quick_store());
    model.update(1);
    auto refused = ck.save(1, {{"note", std::string(5000, 'x')}});
    BOOST_CHECK(refused.durable().wait() == errc::metadata_too_large);
    BOOST_TEST(control->writes == 0u);
    ck.before_update();
    BOOST_CHECK(ck.save(2, {{"varve.step", "7"}}).durable().wait() == std::errc::invalid_argument);
    ck.before_update();
    BOOST_TEST(!ck.save(3, {{"note", std::string(3000, 'x')}}).durable().wait());
    BOOST_TEST(ck.restore()->metadata.at("note").size() == 3000u);
}

BOOST_AUTO_TEST_CASE(the_destructor_cancels_what_does_not_end_in_time) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    toy_model model(3, floats_per_block);
    std::vector<varve::ticket> tickets;
    {
        varve::checkpointer_options options;
        options.drain_on_destroy = 20ms;
        checkpointer<varve::async<3>> ck(model.state(), {12 * block, block}, {}, plain_file_sink(control), dir.path(), quick_store(), options);
        control->door.close();
        tickets.push_back(train_step(ck, model, 1));
        tickets.push_back(train_step(ck, model, 2));
        tickets.push_back(ck.begin(3));
        // The sink has taken writes of the first, and the destructor waits for these; the second has none yet, and is cancelled behind it.
        std::thread([control, second = tickets[1]] {
            second.durable().wait();
            control->door.open();
        }).detach();
    }
    for (auto const& t : tickets) BOOST_CHECK(t.durable().wait_for(0s) == errc::cancelled);
}

BOOST_AUTO_TEST_CASE(without_a_limit_a_ticket_and_the_destructor_wait_for_every_save) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    toy_model model(3, floats_per_block);
    std::vector<varve::ticket> tickets;
    {
        varve::checkpointer_options options;
        options.drain_on_destroy = std::chrono::milliseconds::max();
        checkpointer<varve::async<3>> ck(model.state(), {12 * block, block}, {}, plain_file_sink(control), dir.path(), quick_store(), options);
        control->door.close();
        tickets.push_back(train_step(ck, model, 1));
        tickets.push_back(train_step(ck, model, 2));
        std::thread([control] {
            std::this_thread::sleep_for(200ms);
            control->door.open();
        }).detach();
        BOOST_TEST(!tickets.front().durable().wait_for(std::chrono::milliseconds::max()));
    }
    for (auto const& t : tickets) BOOST_TEST(!t.durable().wait_for(0s));
}

BOOST_AUTO_TEST_CASE(a_checkpoint_of_another_model_is_refused) {
    temporary_folder dir;
    toy_model small(2), large(3);
    {
        checkpointer<varve::sync> ck(small.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store());
        ck.save(1);
    }
    using ck_type = checkpointer<varve::sync>;
    BOOST_CHECK_EXCEPTION(ck_type(large.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store()), varve::error,
                          [](auto const& e) { return e.code() == errc::mismatch; });
    auto options = quick_store();
    options.fresh = options.overwrite = true;
    {
        ck_type ck(large.state(), {block, block}, {}, plain_file_sink{}, dir.path(), options);
        BOOST_TEST(!ck.restore().has_value());
        BOOST_TEST(std::filesystem::exists(dir.path() / "step-000000000001.safetensors"));
        large.update(2);
        BOOST_TEST(!ck.save(2).durable().wait());
        BOOST_TEST(!std::filesystem::exists(dir.path() / "step-000000000001.safetensors"));
    }
}

BOOST_AUTO_TEST_CASE(going_back_and_training_on_makes_the_new_line_the_newest) {
    temporary_folder dir;
    toy_model model;
    {
        checkpointer<varve::layerwise<1>> ck(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store(3));
        for (std::uint64_t step : {50, 110, 120}) train_step(ck, model, step);
        ck.drain();
        BOOST_TEST(ck.restore(50)->step == 50u);
        BOOST_TEST(!train_step(ck, model, 60).durable().wait());
    }
    checkpointer<varve::layerwise<1>> ck(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store(3));
    BOOST_TEST(ck.restore()->step == 60u);
    BOOST_TEST(model.is_of(60));
}

BOOST_AUTO_TEST_CASE(stalls_are_counted) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->delay = 20ms;
    toy_model model;
    checkpointer<varve::sync> ck(model.state(), {block, block}, {}, plain_file_sink(control), dir.path(), quick_store());
    ck.save(1);
    auto stalls = ck.stalls();
    BOOST_TEST(stalls.total_ns >= 20'000'000);
    BOOST_TEST(stalls.wait_ns > 0);
    BOOST_TEST(stalls.wait_ns <= stalls.total_ns);
}

BOOST_AUTO_TEST_CASE(a_requested_save_is_seen_until_the_next_begin) {
    temporary_folder dir;
    toy_model model;
    checkpointer<varve::sync> ck(model.state(), {block, block}, {}, plain_file_sink{}, dir.path(), quick_store());
    BOOST_TEST(!ck.save_requested());
    ck.request_save();
    BOOST_TEST(ck.save_requested());
    ck.save(1);
    BOOST_TEST(!ck.save_requested());
}

BOOST_AUTO_TEST_SUITE_END()
