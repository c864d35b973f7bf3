#include <boost/test/unit_test.hpp>

#include <sys/wait.h>

#include "broken_device.hpp"
#include "device_model.hpp"
#include "files.hpp"
#include "step_files.hpp"
#include "varve/posix/sink.hpp"
#include "varve/scheduling/async.hpp"

// In an executable of its own: a process that has used CUDA cannot hand it on to a child.

namespace {

using namespace varve_test;
constexpr std::size_t block = varve::block_unit_bytes;
constexpr int no_gpu = 77, died = 3, wrong = 4;

/// A training that saves three steps, and whose GPU breaks while it saves the next ones.
int train_until_the_gpu_breaks(std::filesystem::path const& dir, bool unwinds) {
    int gpus = 0;
    if (::cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) return no_gpu;
    device_model model(4, 3 * block + 77);
    user_stream own;
    varve::checkpointer<varve::cuda::pinned_staging, varve::async<3>, varve::posix::sink> ck(
        model.state(), varve::cuda::pinned_staging(2 * block, block, {.snapshots = 2}), {}, varve::posix::sink(), dir);
    auto train = [&](std::uint64_t step) {
        ck.before_update_all({own.stream});
        for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, step, own.stream);
    };
    for (std::uint64_t step = 1; step <= 3; ++step) {
        train(step);
        if (ck.save(step, {}, {own.stream}).durable().wait()) return wrong;
    }
    train(4);
    ck.save(4, {}, {own.stream});
    train(5);
    break_device(own.stream);
    auto const broken = ck.save(5, {}, {own.stream});
    // What kills a process where nobody catches LibTorch's exception.
    if (!unwinds) ::_exit(died);
    if (::cudaStreamSynchronize(own.stream) == cudaSuccess) return wrong;
    return broken.durable().wait() ? died : wrong;
}

void the_store_stays_clean(bool unwinds) {
    temporary_folder dir;
    auto const child = ::fork();
    BOOST_TEST_REQUIRE(child >= 0);
    if (child == 0) {
        int code = wrong;
        try {
            code = train_until_the_gpu_breaks(dir.path(), unwinds);
        } catch (std::exception const& e) {
            std::fprintf(stderr, "in the child: %s\n", e.what());
        }
        ::_exit(code);
    }
    int status = 0;
    BOOST_TEST_REQUIRE(::waitpid(child, &status, 0) == child);
    BOOST_TEST_REQUIRE(WIFEXITED(status));
    if (WEXITSTATUS(status) == no_gpu) return skip("no GPU here");
    BOOST_TEST(WEXITSTATUS(status) == died);

    auto const newest = newest_of_whole_files(dir.path());
    BOOST_TEST(newest >= 3u);
    BOOST_TEST(newest <= 4u);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_dies)

BOOST_AUTO_TEST_CASE(a_training_that_dies_of_a_cuda_error_in_mid_save_leaves_whole_checkpoints) { the_store_stays_clean(false); }

BOOST_AUTO_TEST_CASE(a_training_that_ends_after_a_cuda_error_leaves_whole_checkpoints) { the_store_stays_clean(true); }

BOOST_AUTO_TEST_SUITE_END()
