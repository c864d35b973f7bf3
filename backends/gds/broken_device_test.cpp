#include <boost/test/unit_test.hpp>

#include "broken_device.hpp"
#include "device_model.hpp"
#include "scratch_folder.hpp"
#include "varve/gds/sink.hpp"
#include "varve/gds/staging.hpp"
#include "varve/scheduling/async.hpp"

// In an executable of its own: after such an error no CUDA call of the process works any more.

BOOST_AUTO_TEST_SUITE(gds_broken_device)

BOOST_AUTO_TEST_CASE(a_cuda_error_in_mid_save_fails_the_save_and_keeps_the_one_before) {
    using namespace varve_test;
    if (!have_gpu()) return;
    if (auto why = varve::gds::sink::available()) return skip("no cuFile here: " + why.message());
    scratch_folder dir;
    user_stream own;
    device_model model;
    varve::checkpointer<varve::gds::staging, varve::async<2>, varve::gds::sink> ck(
        model.state(), varve::gds::staging(2 * varve::block_unit_bytes, varve::block_unit_bytes), {}, varve::gds::sink(), dir.path());
    for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, 1, own.stream);
    BOOST_TEST(!ck.save(1, {}, {own.stream}).durable().wait());
    ck.before_update_all({own.stream});
    model.update(0, 2, own.stream);
    break_device(own.stream);
    auto lost = ck.save(2, {}, {own.stream}).durable().wait();
    BOOST_TEST((lost && lost.category() == varve::cuda::category()), lost.message());
    auto saved = ck.files().checkpoints();
    BOOST_REQUIRE(saved.size() == 1u);
    BOOST_TEST(saved[0].step == 1u);
}

BOOST_AUTO_TEST_SUITE_END()
