#include <boost/test/unit_test.hpp>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <varve/checkpointer.hpp>
#include <varve/conformance/snapshots.hpp>
#include <varve/detail/digest.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/scheduling/layerwise.hpp>
#include <varve/staging/host.hpp>

#include "plain_sinks.hpp"
#include "snapshot_rooms.hpp"
#include "support.hpp"
#include "toy_run.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;

/// The least staging that takes snapshots: host memory beside the pool.
class aside_staging : public varve::host_staging {
public:
    aside_staging(std::size_t pool_bytes, std::size_t block_bytes, std::size_t most) : host_staging(pool_bytes, block_bytes), most_(most) {}

    using snapshot_type = snapshot_rooms::slot;

    std::size_t prepare_snapshots(varve::image const& img, varve::state const& s, std::size_t count) {
        image_ = img;
        state_ = &s;
        count = std::min(count, most_);
        rooms_.make(count, img.data_bytes());
        return count;
    }
    snapshot_type acquire_snapshot() noexcept { return rooms_.acquire(); }
    token_type take(snapshot_type& into, std::span<std::size_t const> layers, std::span<point_type const>) noexcept {
        for (auto l : layers)
            for (auto const& p : image_.tensors)
                if (p.layer == l)
                    varve::detail::gather(state_->layers[l].tensors[p.tensor], 0, p.size_bytes,
                                          into.bytes().data() + p.offset_bytes - image_.header_bytes);
        return {};
    }
    token_type copy(buffer_type& into, std::span<varve::copy_range const> ranges, point_type const& after) noexcept {
        ++*from_tensors_;
        return host_staging::copy(into, ranges, after);
    }
    token_type copy(buffer_type& into, std::size_t at, snapshot_type const& from, std::uint64_t offset, std::size_t size,
                    token_type const&) noexcept {
        ++*from_snapshots_;
        std::memcpy(into.data() + at, from.bytes().data() + offset, size);
        return {};
    }

    int copies_from_tensors() const { return *from_tensors_; }
    int copies_from_snapshots() const { return *from_snapshots_; }

private:
    std::size_t most_;
    std::shared_ptr<std::atomic<int>> from_tensors_ = std::make_shared<std::atomic<int>>(0), from_snapshots_ = std::make_shared<std::atomic<int>>(0);
    snapshot_rooms rooms_;
    varve::image image_;
    varve::state const* state_ = nullptr;
};

static_assert(varve::snapshotting_staging<aside_staging> && !varve::snapshotting_staging<varve::host_staging>);

/// One that hashes them, too.
class hashing_staging : public aside_staging {
public:
    struct control {
        std::atomic<bool> able{true};
        std::atomic<int> hashed{0};       ///< snapshots
        std::atomic<int> fail_after{-1};  ///< snapshots until one cannot be hashed; -1: never
        std::uint64_t spoil = 0;          ///< goes into every digest
    };

    hashing_staging(std::size_t pool_bytes, std::size_t block_bytes, std::size_t most, std::shared_ptr<control> c)
        : aside_staging(pool_bytes, block_bytes, most), control_(std::move(c)) {}

    bool digests_snapshots() const noexcept { return control_->able; }
    std::error_code digest(snapshot_type const& from, std::span<std::uint64_t> out) noexcept {
        ++control_->hashed;
        if (control_->fail_after >= 0 && control_->fail_after-- == 0) return std::make_error_code(std::errc::bad_address);
        varve::detail::chunk_digests(from.bytes(), out);
        for (auto& d : out) d ^= control_->spoil;
        return {};
    }

private:
    std::shared_ptr<control> control_;
};

static_assert(varve::snapshot_digesting_staging<hashing_staging> && !varve::snapshot_digesting_staging<aside_staging>);

template <class Scheduling>
using hashing_checkpointer = varve::checkpointer<hashing_staging, Scheduling, plain_file_sink>;

template <class Scheduling>
void hashes_each_snapshot_once(Scheduling scheduling) {
    for (std::size_t pool_blocks : {1, 16}) {
        temporary_folder dir;
        toy_model model(6, floats_per_block / 2 + 17);
        auto control = std::make_shared<hashing_staging::control>();
        hashing_checkpointer<Scheduling> ck(model.state(), {pool_blocks * block, block, 2, control}, scheduling, plain_file_sink(), dir.path(),
                                            quick_store(1000));
        for (std::uint64_t step = 1; step <= 4; ++step) train_step(ck, model, step);
        ck.drain();
        BOOST_TEST(control->hashed == 4);
        varve::restore_options thorough;
        thorough.verify_first = true;
        BOOST_TEST(ck.restore({}, thorough)->step == 4u);
        BOOST_TEST(model.is_of(4));
    }
}

template <class Scheduling>
using checkpointer = varve::checkpointer<aside_staging, Scheduling, plain_file_sink>;

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling, std::size_t pool_blocks, std::size_t snapshots) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->delay = 2ms;
    toy_model model(6, floats_per_block / 2 + 17);
    std::uint64_t const steps = varve_test::full() ? 60 : 12;
    {
        checkpointer<Scheduling> ck(model.state(), {pool_blocks * block, block, snapshots}, scheduling, plain_file_sink(control), dir.path(),
                                    quick_store(1000));
        for (std::uint64_t step = 1; step <= steps; ++step) train_step(ck, model, step, step % 3 != 0);
        ck.drain();
    }
    checkpointer<Scheduling> ck(model.state(), {block, block, 0}, scheduling, plain_file_sink(control), dir.path(), quick_store(1000));
    auto saved = ck.files().checkpoints();
    BOOST_TEST(saved.size() == steps - steps / 3);
    for (auto const& c : saved) {
        ck.restore(c.step);
        BOOST_TEST(model.is_of(c.step), "step " << c.step);
    }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(snapshot_suite)

BOOST_AUTO_TEST_CASE(the_stagings_of_these_tests_keep_the_laws_and_one_whose_digests_are_wrong_breaks_one) {
    auto control = std::make_shared<hashing_staging::control>();
    varve::conformance::staging_fixture<hashing_staging> f{
        .make = [&](std::size_t pool_bytes, std::size_t block_bytes) { return hashing_staging(pool_bytes, block_bytes, 2, control); }};
    BOOST_TEST(varve::conformance::check_snapshots(f) == std::vector<std::string>(), boost::test_tools::per_element());
    control->spoil = 1;
    auto const broken = varve::conformance::check_snapshots(f);
    BOOST_TEST_REQUIRE(!broken.empty());
    for (auto const& law : broken) BOOST_TEST(law.starts_with("the digests of a snapshot are those"), law);
}

BOOST_AUTO_TEST_CASE(no_checkpoint_from_a_snapshot_mixes_steps) {
    for (std::size_t pool_blocks : {1, 2, 16})
        for (std::size_t snapshots : {1, 2, 4}) {
            never_mixes_steps(varve::async<3>{}, pool_blocks, snapshots);
            never_mixes_steps(varve::layerwise<3>{}, pool_blocks, snapshots);
        }
}

BOOST_AUTO_TEST_CASE(with_snapshots_training_goes_on_while_nothing_can_be_written) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->door.close();
    toy_model model(6, floats_per_block / 2 + 17);
    {
        checkpointer<varve::async<2>> ck(model.state(), {block, block, 2}, {}, plain_file_sink(control), dir.path(), quick_store(1000));
        BOOST_TEST(ck.max_in_flight() == 2u);
        train_step(ck, model, 1);
        train_step(ck, model, 2);
        for (std::uint64_t step = 3; step <= 20; ++step) train_step(ck, model, step, false);
        control->door.open();
        ck.drain();
        ck.restore(1);
        BOOST_TEST(model.is_of(1));
        ck.restore(2);
        BOOST_TEST(model.is_of(2));
    }
}

BOOST_AUTO_TEST_CASE(a_save_that_is_replaced_gives_its_snapshot_to_the_next) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->door.close();
    toy_model model(6, floats_per_block / 2 + 17);
    varve::checkpointer_options options;
    options.busy = varve::when_busy::replace;
    checkpointer<varve::async<2>> ck(model.state(), {2 * block, block, 2}, {}, plain_file_sink(control), dir.path(), quick_store(1000), options);
    std::vector<varve::ticket> tickets;
    for (std::uint64_t step = 1; step <= 6; ++step) tickets.push_back(train_step(ck, model, step));
    control->door.open();
    ck.drain();
    BOOST_TEST(!tickets.front().durable().wait());
    BOOST_TEST(!tickets.back().durable().wait());
    for (std::size_t i = 1; i + 1 < tickets.size(); ++i) BOOST_TEST((tickets[i].durable().wait() == varve::errc::replaced));
    ck.restore(6);
    BOOST_TEST(model.is_of(6));
}

BOOST_AUTO_TEST_CASE(a_save_that_gives_way_at_every_step_leaves_the_next_one_its_snapshot_at_once) {
    temporary_folder dir;
    auto control = std::make_shared<sink_control>();
    control->door.close();
    toy_model model(6, floats_per_block / 2 + 17);
    varve::checkpointer_options options;
    options.busy = varve::when_busy::replace;
    checkpointer<varve::layerwise<2>> ck(model.state(), {16 * block, block, 2}, {}, plain_file_sink(control), dir.path(), quick_store(1000), options);
    varve::ticket last = train_step(ck, model, 1);
    BOOST_TEST_REQUIRE(!last.staged().wait());
    auto const of_the_first = ck.staging().copies_from_snapshots();
    BOOST_TEST(of_the_first > 0);
    for (std::uint64_t step = 2; step <= 50; ++step) last = train_step(ck, model, step);
    std::this_thread::sleep_for(50ms);
    BOOST_TEST(ck.staging().copies_from_snapshots() == of_the_first);
    BOOST_TEST(ck.staging().copies_from_tensors() == 0);
    control->door.open();
    BOOST_TEST(!last.durable().wait());
    ck.drain();
    ck.restore(50);
    BOOST_TEST(model.is_of(50));
}

BOOST_AUTO_TEST_CASE(a_save_that_ends_early_leaves_its_snapshot_and_its_layers_free) {
    temporary_folder dir;
    toy_model model(6, floats_per_block / 2 + 17);
    for (std::size_t snapshots : {0, 1}) {
        checkpointer<varve::layerwise<2>> ck(model.state(), {block, block, snapshots}, {}, plain_file_sink(), dir.path(), quick_store(1000));
        for (std::uint64_t step = 1; step <= 3; ++step) {
            ck.begin(step);
            for (std::size_t l = 0; l < 3; ++l) {
                ck.before_update(l);
                model.update(l, step);
                ck.layer_ready(l);
            }
            BOOST_TEST((ck.seal({{"k", std::string(100'000, 'x')}}).durable().wait() == varve::errc::metadata_too_large));
            ck.before_update();
        }
        BOOST_TEST(!train_step(ck, model, 4).durable().wait());
    }
}

BOOST_AUTO_TEST_CASE(a_staging_that_hashes_its_snapshots_does_so_once_a_save) {
    hashes_each_snapshot_once(varve::async<2>{});
    hashes_each_snapshot_once(varve::layerwise<2>{});
}

BOOST_AUTO_TEST_CASE(a_wrong_digest_of_a_snapshot_is_a_checkpoint_that_is_not_whole_and_none_is_made_where_it_cannot) {
    toy_model model;
    auto control = std::make_shared<hashing_staging::control>();
    control->spoil = 1;
    for (bool able : {true, false}) {
        temporary_folder dir;
        control->able = able;
        hashing_checkpointer<varve::async<1>> ck(model.state(), {block, block, 1, control}, {}, plain_file_sink(), dir.path());
        BOOST_TEST(!ck.save(1).durable().wait());
        if (able)
            BOOST_CHECK_THROW(ck.restore(), varve::error);
        else
            BOOST_TEST(ck.restore()->step == 1u);
        BOOST_TEST(control->hashed == 1);
    }
}

BOOST_AUTO_TEST_CASE(a_snapshot_that_cannot_be_hashed_fails_its_save_and_no_other) {
    temporary_folder dir;
    toy_model model(6, floats_per_block / 2 + 17);
    auto control = std::make_shared<hashing_staging::control>();
    control->fail_after = 0;
    hashing_checkpointer<varve::layerwise<2>> ck(model.state(), {2 * block, block, 1, control}, {}, plain_file_sink(), dir.path());
    BOOST_TEST((train_step(ck, model, 1).durable().wait() == std::errc::bad_address));
    BOOST_TEST(!train_step(ck, model, 2).durable().wait());
    BOOST_TEST(ck.restore()->step == 2u);
    BOOST_TEST(model.is_of(2));
}

BOOST_AUTO_TEST_SUITE_END()
