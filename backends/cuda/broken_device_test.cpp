#include <boost/test/unit_test.hpp>

#include "broken_device.hpp"
#include "device_model.hpp"
#include "varve/scheduling/async.hpp"

// In an executable of its own: after such an error no CUDA call of the process works any more.

namespace {

using namespace varve_test;

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_broken_device)

BOOST_AUTO_TEST_CASE(a_cuda_error_in_mid_save_fails_the_save_and_nothing_hangs) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    varve::ticket whole = [&] {
        varve::checkpointer<varve::cuda::pinned_staging, varve::async<3>, checking_sink> ck(
            model.state(), varve::cuda::pinned_staging(2 * varve::block_unit_bytes, varve::block_unit_bytes, {.snapshots = 2}), {},
            checking_sink(model.state(), log));
        for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, 1, own.stream);
        auto first = ck.save(1, {}, {own.stream});
        BOOST_TEST(!first.durable().wait());
        ck.before_update_all({own.stream});
        model.update(0, 2, own.stream);
        break_device(own.stream);
        auto second = ck.save(2, {}, {own.stream});
        auto ec = second.durable().wait();
        BOOST_TEST((ec && ec.category() == varve::cuda::category()), ec.message());
        auto third = ck.save(3, {}, {own.stream});
        BOOST_TEST(static_cast<bool>(third.durable().wait()));
        return first;
    }();
    BOOST_TEST(!whole.durable().wait());
    BOOST_TEST(log->steps == std::vector<int>{1}, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_SUITE_END()
