#include <boost/test/unit_test.hpp>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "late_stream.hpp"
#include "pinned_training.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"

/// Streams and graphs of the user's own.
namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::cuda::pinned_staging;
constexpr std::size_t block = varve::block_unit_bytes;

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_capture)

BOOST_AUTO_TEST_CASE(a_stream_that_is_captured_is_refused_and_the_capture_goes_on) {
    if (!have_gpu() || !can_hold_streams()) return;
    user_stream own;
    late_stream late(own.stream);
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    log->delay = 5ms;
    for (std::size_t snapshots : {0, 1}) {
        checkpointer<varve::async<2>> ck(model.state(), pinned_staging(2 * block, block, {.snapshots = snapshots}), varve::async<2>{},
                                         checking_sink(model.state(), log));
        // Saves are under way on varve's threads while this one captures in the strictest mode; no copy has come before the wait is refused.
        std::atomic<bool> waited = false;
        auto const opener = late.hold_until([&] { return waited.load(); });
        auto before = train_step(ck, model, 1, own.stream);
        cudaGraph_t graph = nullptr;
        expect(::cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeGlobal));
        BOOST_CHECK_EXCEPTION(ck.before_update(0, {own.stream}), varve::error, [](auto const& e) { return e.code() == varve::errc::unsupported; });
        waited = true;
        for (auto const& l : model.state().layers) expect(::cudaMemsetAsync(l.tensors[0].data, 9, l.tensors[0].size_bytes(), own.stream));
        std::this_thread::sleep_for(50ms);
        auto refused = ck.save(2, {}, {own.stream});
        std::this_thread::sleep_for(50ms);
        // Nor does the one before it stand in another's way.
        BOOST_TEST((refused.durable().wait() == varve::errc::unsupported));
        BOOST_TEST((ck.save(2, {}, {own.stream}).durable().wait() == varve::errc::unsupported));
        expect(::cudaStreamEndCapture(own.stream, &graph));
        BOOST_TEST(!before.durable().wait());
        cudaGraphExec_t runnable = nullptr;
        expect(::cudaGraphInstantiate(&runnable, graph, 0));
        // The updates are in the graph: before each launch, the wait; after it, the save.
        for (std::uint64_t step = 3; step <= 6; ++step) {
            ck.before_update_all({own.stream});
            expect(::cudaGraphLaunch(runnable, own.stream));
            for (std::size_t l = 0; l < model.layers(); ++l) {
                auto& t = model.state().layers[l].tensors[1];
                std::memset(t.data, 9, t.size_bytes());
            }
            ck.save(step, {}, {own.stream});
        }
        ck.drain();
        expect(::cudaGraphExecDestroy(runnable));
        expect(::cudaGraphDestroy(graph));
        BOOST_TEST(log->steps == (std::vector<int>{1, 9, 9, 9, 9}), boost::test_tools::per_element());
        log->steps.clear();
    }
}

BOOST_AUTO_TEST_CASE(layerwise_calls_in_a_capture_are_unsupported_and_the_capture_goes_on) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    log->delay = 5ms;
    for (std::size_t snapshots : {0, 2}) {
        checkpointer<varve::layerwise<2>> ck(model.state(), pinned_staging(2 * block, block, {.snapshots = snapshots, .measure_waits = true}),
                                             varve::layerwise<2>{}, checking_sink(model.state(), log));
        auto before = train_step(ck, model, 1, own.stream);
        for (std::size_t l = 0; l < model.layers(); ++l) ck.before_update(l, {own.stream});
        expect(::cudaStreamSynchronize(own.stream));
        cudaGraph_t graph = nullptr;
        expect(::cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeGlobal));
        auto refused = ck.begin(2);
        for (std::size_t l = 0; l < model.layers(); ++l) {
            expect(::cudaMemsetAsync(model.state().layers[l].tensors[0].data, 8, model.state().layers[l].tensors[0].size_bytes(), own.stream));
            ck.layer_ready(l, {own.stream});
        }
        ck.seal({}, {own.stream});
        BOOST_TEST(ck.stalls().gpu_wait_ns >= 0);
        expect(::cudaStreamEndCapture(own.stream, &graph));
        BOOST_TEST((refused.durable().wait() == varve::errc::unsupported));
        BOOST_TEST(!before.durable().wait());
        cudaGraphExec_t runnable = nullptr;
        expect(::cudaGraphInstantiate(&runnable, graph, 0));
        expect(::cudaGraphLaunch(runnable, own.stream));
        expect(::cudaStreamSynchronize(own.stream));
        // And the next one, outside, is whole.
        BOOST_TEST(!train_step(ck, model, 3, own.stream).durable().wait());
        expect(::cudaGraphExecDestroy(runnable));
        expect(::cudaGraphDestroy(graph));
        BOOST_TEST(log->steps == (std::vector<int>{1, 3}), boost::test_tools::per_element());
        log->steps.clear();
    }
}

BOOST_AUTO_TEST_CASE(a_user_may_change_to_a_stream_of_his_own_between_and_within_steps) {
    if (!have_gpu()) return;
    user_stream first, second;
    device_model model(4);
    auto log = std::make_shared<checking_sink::log>();
    log->delay = 3ms;
    for (std::size_t snapshots : {0, 2}) {
        std::vector<int> expected;
        checkpointer<varve::layerwise<2>> ck(model.state(), pinned_staging(2 * block, block, {.snapshots = snapshots}), varve::layerwise<2>{},
                                             checking_sink(model.state(), log));
        cudaEvent_t handed_over = nullptr;
        expect(::cudaEventCreateWithFlags(&handed_over, cudaEventDisableTiming));
        for (std::uint64_t step = 1; step <= 12; ++step) {
            ck.begin(step);
            for (std::size_t l = 0; l < model.layers(); ++l) {
                // Layers change streams from step to step; the user orders his own work.
                auto const stream = (l + step) % 2 ? first.stream : second.stream, other = (l + step) % 2 ? second.stream : first.stream;
                expect(::cudaEventRecord(handed_over, other));
                expect(::cudaStreamWaitEvent(stream, handed_over, 0));
                ck.before_update(l, {stream});
                model.update(l, step, stream, true);
                ck.layer_ready(l, {stream});
            }
            ck.seal({}, {first.stream});
            expected.push_back(static_cast<int>(step));
        }
        ck.drain();
        expect(::cudaEventDestroy(handed_over));
        BOOST_TEST(log->steps == expected, boost::test_tools::per_element());
        log->steps.clear();
    }
}

BOOST_AUTO_TEST_SUITE_END()
