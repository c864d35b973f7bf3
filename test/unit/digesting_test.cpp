#include <boost/test/unit_test.hpp>

#include <memory>
#include <utility>

#include <varve/checkpointer.hpp>
#include <varve/conformance/staging.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/scheduling/layerwise.hpp>

#include "device_staging.hpp"
#include "plain_sinks.hpp"
#include "support.hpp"

namespace {

using namespace varve_test;
constexpr std::size_t block = varve::block_unit_bytes;

/// The same files, from memory of any kind.
struct any_memory_sink : plain_file_sink {
    using plain_file_sink::plain_file_sink;
    static constexpr bool accepts(varve::memory_kind) { return true; }
};

template <class Scheduling>
using checkpointer = varve::checkpointer<device_staging, Scheduling, any_memory_sink>;

}  // namespace

BOOST_AUTO_TEST_SUITE(digesting_staging)

BOOST_AUTO_TEST_CASE(digests_of_a_staging_that_hashes_are_those_in_the_file) {
    temporary_folder dir;
    toy_model model(3, block / 4 + 1001);
    auto control = std::make_shared<device_staging::control>();
    checkpointer<varve::layerwise<2>> ck(model.state(), device_staging(2 * block, block, control), {}, {}, dir.path());
    for (std::uint64_t step = 1; step <= 4; ++step) {
        ck.before_update();
        model.update(step);
        ck.save(step);
    }
    ck.drain();
    BOOST_TEST(control->hashed == 4 * (ck.image_bytes() + block - 1) / block);
    model.update(9);
    varve::restore_options thorough;
    thorough.verify_first = true;
    auto restored = ck.restore({}, thorough);
    BOOST_REQUIRE(restored.has_value());
    BOOST_TEST(restored->step == 4u);
    BOOST_TEST(model.is_of(4));
}

BOOST_AUTO_TEST_CASE(a_wrong_digest_of_the_staging_is_a_checkpoint_that_is_not_whole) {
    temporary_folder dir;
    toy_model model;
    auto control = std::make_shared<device_staging::control>();
    control->spoil = 1;
    checkpointer<varve::async<1>> ck(model.state(), device_staging(block, block, control), {}, {}, dir.path());
    BOOST_TEST(!ck.save(1).durable().wait());
    BOOST_CHECK_THROW(ck.restore(), varve::error);
}

BOOST_AUTO_TEST_CASE(a_block_that_cannot_be_hashed_fails_its_save_and_no_other) {
    temporary_folder dir;
    toy_model model(3, block / 4);
    auto control = std::make_shared<device_staging::control>();
    control->fail_after = 1;
    checkpointer<varve::async<2>> ck(model.state(), device_staging(8 * block, block, control), {}, {}, dir.path());
    model.update(1);
    auto lost = ck.save(1);
    BOOST_TEST((lost.durable().wait() == std::errc::bad_address));
    ck.before_update();
    model.update(2);
    BOOST_TEST(!ck.save(2).durable().wait());
    BOOST_TEST(ck.restore()->step == 2u);
}

BOOST_AUTO_TEST_SUITE_END()
