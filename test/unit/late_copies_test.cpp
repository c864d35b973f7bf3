#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <varve/checkpointer.hpp>
#include <varve/conformance/snapshots.hpp>
#include <varve/conformance/staging.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/scheduling/layerwise.hpp>
#include <varve/scheduling/sync.hpp>

#include "checking_sink.hpp"
#include "comes_to.hpp"
#include "late_device.hpp"
#include "support.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
constexpr std::size_t block = varve::block_unit_bytes;

/// Of memory that the host reaches: none is to be fetched.
struct fetch_nothing {
    std::error_code operator()(std::byte*, varve::block const&) const noexcept { return std::make_error_code(std::errc::not_supported); }
};
using checking_sink = checking_sink_by<fetch_nothing>;
template <class Scheduling>
using checkpointer = varve::checkpointer<late_staging, Scheduling, checking_sink>;

/// Layers that a stream updates late, each with a few bytes that the CPU updates at once. Every byte says the step of the last
/// update, but for the time of one, in which it says nothing true.
class late_model {
public:
    explicit late_model(std::size_t layers = 3) {
        for (std::size_t l = 0; l < layers; ++l) {
            auto name = "layer" + std::to_string(l);
            auto& w = weights_.emplace_back(block + 4099 + l);
            auto& s = scalars_.emplace_back(5 + l);
            state_.layers.push_back(
                {name,
                 {{name + ".weight", varve::dtype::U8, {static_cast<std::int64_t>(w.size())}, w.data(), {}, varve::memory_kind::device},
                  {name + ".scalar", varve::dtype::U8, {static_cast<std::int64_t>(s.size())}, s.data(), {}}}});
        }
    }

    varve::state& state() { return state_; }
    /// The step that the layer's first and last byte say, in a stream's work that nothing may overtake.
    int step_of(std::size_t layer) const {
        auto const& w = weights_[layer];
        return w.front() == w.back() ? std::to_integer<int>(w.front()) : -1;
    }

    void update(std::size_t layer, std::uint64_t step, late_stream& stream) {
        std::memset(scalars_[layer].data(), static_cast<int>(step), scalars_[layer].size());
        stream.put([&w = weights_[layer], step] {
            std::memset(w.data(), 0xEE, w.size());
            std::this_thread::sleep_for(200us);
            std::memset(w.data(), static_cast<int>(step), w.size());
        });
    }

    /// A step of a training without a save, and one with.
    template <class Checkpointer>
    void step(Checkpointer& ck, std::uint64_t number, late_stream& stream, bool saves = false) {
        for (std::size_t l = 0; l < state_.layers.size(); ++l) {
            ck.before_update(l, {&stream});
            update(l, number, stream);
            if (saves) ck.layer_ready(l, {&stream});
        }
    }
    template <class Checkpointer>
    varve::ticket saved_step(Checkpointer& ck, std::uint64_t number, late_stream& stream) {
        ck.begin(number);
        step(ck, number, stream, true);
        return ck.seal({}, {&stream});
    }

private:
    std::vector<std::vector<std::byte>> weights_, scalars_;
    varve::state state_;
};

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling) {
    std::uint64_t const steps = full() ? 60 : 15;
    for (std::size_t pool_blocks : {1, 2, 16})
        for (std::size_t snapshots : {0, 1, 2}) {
            late_model model;
            late_stream training;
            auto log = std::make_shared<checking_sink::log>();
            log->delay = 1ms;
            auto control = std::make_shared<late_control>();
            control->delay = 300us;
            control->hashes = pool_blocks != 2;
            varve::checkpointer_options options;
            if (pool_blocks == 16) options.batch_bytes = block;  // what holds a save back then is not the pool
            std::vector<int> expected;
            {
                checkpointer<Scheduling> ck(model.state(), late_staging(pool_blocks * block, block, snapshots, control), scheduling,
                                            checking_sink(model.state(), log), options);
                for (std::uint64_t step = 1; step <= steps; ++step) {
                    if (step % 3 == 0) {
                        model.step(ck, step, training);
                        continue;
                    }
                    model.saved_step(ck, step, training);
                    expected.push_back(static_cast<int>(step));
                }
                ck.drain();
            }
            BOOST_TEST_CONTEXT("pool of " << pool_blocks << ", snapshots " << snapshots)
            BOOST_TEST(log->steps == expected, boost::test_tools::per_element());
        }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(late_copies)

BOOST_AUTO_TEST_CASE(the_staging_of_these_tests_keeps_the_laws) {
    late_stream stream;
    varve::conformance::staging_fixture<late_staging> f;
    f.make = [](std::size_t pool_bytes, std::size_t block_bytes) {
        auto control = std::make_shared<late_control>();
        control->delay = 2ms;
        return late_staging(pool_bytes, block_bytes, 2, control);
    };
    f.order = {&stream};
    f.tensors = varve::memory_kind::device;
    BOOST_TEST(varve::conformance::check_staging(f) == std::vector<std::string>(), boost::test_tools::per_element());
    BOOST_TEST(varve::conformance::check_snapshots(f) == std::vector<std::string>(), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_sync_save_mixes_steps) { never_mixes_steps(varve::sync{}); }
BOOST_AUTO_TEST_CASE(no_checkpoint_of_an_async_save_mixes_steps) { never_mixes_steps(varve::async<3>{}); }
BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_layerwise_save_mixes_steps) { never_mixes_steps(varve::layerwise<3>{}); }

BOOST_AUTO_TEST_CASE(what_gives_way_at_every_step_leaves_whole_checkpoints) {
    late_model model;
    late_stream training;
    auto log = std::make_shared<checking_sink::log>();
    log->delay = 3ms;
    varve::checkpointer_options options;
    options.busy = varve::when_busy::replace;
    std::optional<varve::ticket> last;
    std::uint64_t last_taken = 0;
    {
        checkpointer<varve::layerwise<2>> ck(model.state(), late_staging(2 * block, block, 2), {}, checking_sink(model.state(), log), options);
        for (std::uint64_t step = 1; step <= 40; ++step)
            // Between a turn's end and the commit there is none that could give way.
            if (auto const t = model.saved_step(ck, step, training); t.taken()) last = t, last_taken = step;
        ck.drain();
    }
    BOOST_TEST(!last->durable().wait());
    BOOST_TEST_REQUIRE(!log->steps.empty());
    BOOST_TEST(log->steps.back() == static_cast<int>(last_taken));
    BOOST_TEST(std::is_sorted(log->steps.begin(), log->steps.end()));
    BOOST_TEST(log->steps.front() > 0);
}

BOOST_AUTO_TEST_CASE(of_copies_that_are_hashed_elsewhere_one_thread_waits) {
    for (bool hashed : {true, false}) {
        late_model model;
        late_stream training;
        auto control = std::make_shared<late_control>();
        control->delay = 5ms;
        control->hashes = hashed;
        varve::checkpointer_options options;
        options.digest_workers = 4;
        options.batch_bytes = 16 * block;
        {
            checkpointer<varve::async<2>> ck(model.state(), late_staging(16 * block, block, 2, control), {},
                                             checking_sink(model.state(), std::make_shared<checking_sink::log>()), options);
            for (std::uint64_t step = 1; step <= 6; ++step) BOOST_TEST(!model.saved_step(ck, step, training).durable().wait());
        }
        if (hashed)
            BOOST_TEST(control->most_waiting == 1);
        else
            BOOST_TEST(control->most_waiting > 1);
    }
}

BOOST_AUTO_TEST_CASE(a_copy_that_fails_late_fails_its_save_and_no_other) {
    for (std::size_t snapshots : {0, 1}) {
        late_model model;
        late_stream training;
        auto log = std::make_shared<checking_sink::log>();
        auto control = std::make_shared<late_control>();
        control->delay = 300us;
        checkpointer<varve::layerwise<2>> ck(model.state(), late_staging(2 * block, block, snapshots, control), {},
                                             checking_sink(model.state(), log));
        BOOST_TEST(!model.saved_step(ck, 1, training).durable().wait());
        control->fail_after = 2;
        BOOST_TEST((model.saved_step(ck, 2, training).durable().wait() == std::errc::bad_address));
        BOOST_TEST(!model.saved_step(ck, 3, training).durable().wait());
        BOOST_TEST(log->steps == (std::vector<int>{1, 3}), boost::test_tools::per_element());
    }
}

BOOST_AUTO_TEST_CASE(no_update_overtakes_what_a_lost_save_still_puts_aside) {
    late_model model;
    late_stream training;
    auto control = std::make_shared<late_control>();
    control->delay = 3ms;
    std::vector<int> seen, expected;
    control->taken = [&](std::size_t layer) { seen.push_back(model.step_of(layer)); };
    {
        checkpointer<varve::layerwise<2>> ck(model.state(), late_staging(2 * block, block, 1, control), {},
                                             checking_sink(model.state(), std::make_shared<checking_sink::log>()));
        for (std::uint64_t step = 1; step <= 9; step += 3) {
            auto const before = control->takes.load();
            ck.begin(step);
            // What half of the bytes make is put aside at once, and lost at seal.
            model.step(ck, step, training, true);
            BOOST_TEST(comes_to([&] { return control->takes != before; }, 20s, 100us));
            BOOST_TEST((ck.seal({{"k", std::string(100'000, 'x')}}, {&training}).durable().wait() == varve::errc::metadata_too_large));
            for (auto const next : {step + 1, step + 2}) model.step(ck, next, training);
            expected.insert(expected.end(), 2, static_cast<int>(step));
        }
    }
    BOOST_TEST(seen == expected, boost::test_tools::per_element());
}

template <class Scheduling>
void goes_on_while_it_is_put_aside(Scheduling scheduling) {
    late_model model;
    late_stream training;
    auto log = std::make_shared<checking_sink::log>();
    auto control = std::make_shared<late_control>();
    checkpointer<Scheduling> ck(model.state(), late_staging(2 * block, block, 1, control), scheduling, checking_sink(model.state(), log));
    control->taking.close();
    std::atomic<bool> sealed = false, opened = false;
    std::jthread opener([&] {
        comes_to([&] { return sealed.load(); }, 20s, 100us);
        std::this_thread::sleep_for(20ms);
        opened = true;
        control->taking.open();
    });
    auto const saved = model.saved_step(ck, 1, training);
    BOOST_TEST(!opened);
    sealed = true;
    ck.before_update(1, {&training});
    BOOST_TEST(opened);
    BOOST_TEST(!saved.durable().wait());
    BOOST_TEST(log->steps == (std::vector<int>{1}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(training_goes_on_while_a_save_is_put_aside_and_only_its_next_update_waits) {
    goes_on_while_it_is_put_aside(varve::async<1>{});
    goes_on_while_it_is_put_aside(varve::layerwise<1>{});
}

BOOST_AUTO_TEST_CASE(a_layerwise_save_is_put_aside_half_way_and_at_its_end) {
    late_model model(6);
    late_stream training;
    auto control = std::make_shared<late_control>();
    checkpointer<varve::layerwise<2>> ck(model.state(), late_staging(16 * block, block, 1, control), {},
                                         checking_sink(model.state(), std::make_shared<checking_sink::log>()));
    ck.begin(1);
    for (std::size_t l = 0; l < 6; ++l) {
        ck.before_update(l, {&training});
        model.update(l, 1, training);
        ck.layer_ready(l, {&training});
        // It is there while the others are still to be updated.
        if (l == 3) BOOST_TEST(comes_to([&] { return control->takes == 1; }, 20s, 100us));
    }
    BOOST_TEST(control->takes == 1);
    BOOST_TEST(!ck.seal({}, {&training}).durable().wait());
    BOOST_TEST(control->takes == 2);
}

BOOST_AUTO_TEST_CASE(a_save_gives_way_once_it_is_put_aside_and_the_next_takes_its_snapshot_over) {
    late_model model;
    late_stream training;
    auto log = std::make_shared<checking_sink::log>();
    log->door.close();
    auto control = std::make_shared<late_control>();
    varve::checkpointer_options options;
    options.busy = varve::when_busy::replace;
    options.digest_workers = 8;
    {
        checkpointer<varve::async<2>> ck(model.state(), late_staging(16 * block, block, 1, control), {}, checking_sink(model.state(), log), options);
        auto const first = model.saved_step(ck, 1, training);
        BOOST_TEST(!first.staged().wait_for(20s));
        control->taking.close();
        auto const second = model.saved_step(ck, 2, training);
        std::jthread opener([&] {
            std::this_thread::sleep_for(20ms);
            control->taking.open();
        });
        // The taker is at the second one's.
        ck.begin(3);
        BOOST_TEST((second.durable().wait_for(20s) == varve::errc::replaced));
        model.step(ck, 3, training, true);
        ck.seal({}, {&training});
        log->door.open();
    }
    BOOST_TEST(control->from_tensors == 0);
    BOOST_TEST(log->steps == (std::vector<int>{1, 3}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(an_update_waits_for_no_snapshot_of_which_a_copy_came_and_for_one_that_is_not_copied_yet) {
    for (bool copied : {true, false}) {
        late_model model;
        late_stream training;
        auto control = std::make_shared<late_control>();
        auto log = std::make_shared<checking_sink::log>();
        if (!copied) log->door.close();
        varve::checkpointer_options options;
        options.busy = varve::when_busy::replace;
        options.digest_workers = 8;
        checkpointer<varve::layerwise<2>> ck(model.state(), late_staging(16 * block, block, 2, control), {}, checking_sink(model.state(), log),
                                             options);
        auto const first = model.saved_step(ck, 1, training);
        // The door keeps the sink from it, so that the second save keeps to its snapshot.
        BOOST_TEST(!first.staged().wait_for(20s));
        if (copied) BOOST_TEST(!first.durable().wait_for(20s));
        auto const second = model.saved_step(ck, 2, training);
        if (copied) BOOST_TEST(!second.staged().wait_for(20s));
        control->ordered = 0;
        model.step(ck, 3, training);
        BOOST_TEST((control->ordered == 0) == copied);
        log->door.open();
        ck.drain();
        BOOST_TEST(log->steps == (std::vector<int>{1, 2}), boost::test_tools::per_element());
    }
}

BOOST_AUTO_TEST_CASE(a_save_that_nothing_orders_behind_the_one_before_is_lost_and_its_ticket_says_why) {
    for (std::size_t snapshots : {0, 1}) {
        late_model model;
        gate before_all;
        late_stream training;
        auto control = std::make_shared<late_control>();
        auto log = std::make_shared<checking_sink::log>();
        checkpointer<varve::layerwise<2>> ck(model.state(), late_staging(16 * block, block, snapshots, control), {},
                                             checking_sink(model.state(), log));
        before_all.close();
        training.put([&] { before_all.pass(); });
        auto const first = model.saved_step(ck, 1, training);
        control->refuses_order = true;
        // Without before_update, as a training that has lost its device cannot go on either.
        auto const second = ck.save(2, {}, {&training});
        BOOST_TEST((second.durable().wait() == std::errc::operation_not_supported));
        BOOST_CHECK_EXCEPTION(ck.before_update_all({&training}), varve::error,
                              [](auto const& e) { return e.code() == std::errc::operation_not_supported; });
        control->refuses_order = false;
        // Each layer waits all the same, whichever comes first.
        late_stream elsewhere;
        for (std::size_t l = 3; l-- > 0;) {
            ck.before_update(l, {&elsewhere});
            model.update(l, 2, elsewhere);
        }
        before_all.open();
        BOOST_TEST(!first.durable().wait());
        late_event(elsewhere, control).wait();
        BOOST_TEST(!model.saved_step(ck, 3, training).durable().wait());
        BOOST_TEST(log->steps == (std::vector<int>{1, 3}), boost::test_tools::per_element());
    }
}

BOOST_AUTO_TEST_CASE(a_lost_save_in_another_stream_takes_no_wait_from_the_updates) {
    for (std::size_t snapshots : {0, 1}) {
        late_model model;
        late_stream training, saving;
        auto control = std::make_shared<late_control>();
        control->delay = 3ms;
        auto log = std::make_shared<checking_sink::log>();
        checkpointer<varve::async<2>> ck(model.state(), late_staging(16 * block, block, snapshots, control), {}, checking_sink(model.state(), log));
        auto const first = model.saved_step(ck, 1, training);
        auto const second = ck.save(2, {{"k", std::string(100'000, 'x')}}, {&saving});
        BOOST_TEST((second.durable().wait() == varve::errc::metadata_too_large));
        model.step(ck, 2, training);
        BOOST_TEST(!first.durable().wait());
        BOOST_TEST(log->steps == (std::vector<int>{1}), boost::test_tools::per_element());
    }
}

BOOST_AUTO_TEST_CASE(a_checkpointer_that_ends_at_once_leaves_no_copy_behind) {
    for (std::size_t snapshots : {0, 2})
        for (int round = 0; round < (full() ? 40 : 8); ++round) {
            late_model model;
            late_stream training;
            auto control = std::make_shared<late_control>();
            control->delay = std::chrono::microseconds(250 * round % 1500);
            varve::checkpointer_options options;
            options.drain_on_destroy = 0ms;
            std::optional<varve::ticket> last;
            {
                checkpointer<varve::async<2>> ck(model.state(), late_staging(2 * block, block, snapshots, control), {},
                                                 checking_sink(model.state(), std::make_shared<checking_sink::log>()), options);
                for (std::uint64_t step = 1; step <= 3; ++step) last = model.saved_step(ck, step, training);
            }
            auto const outcome = last->durable().wait();
            BOOST_TEST((!outcome || outcome == varve::errc::cancelled), outcome.message());
        }
}

BOOST_AUTO_TEST_SUITE_END()
