#include <boost/test/unit_test.hpp>

#include "breaking_run.hpp"
#include "files.hpp"
#include "varve/posix/sink.hpp"
#include "varve/scheduling/async.hpp"

// In an executable of its own: a process that has used CUDA cannot hand it on to a child.

namespace {

using namespace varve_test;
constexpr std::size_t block = varve::block_unit_bytes;

/// A training that saves three steps, and whose GPU breaks while it saves the next ones.
int train_until_the_gpu_breaks(std::filesystem::path const& dir, bool unwinds) {
    int gpus = 0;
    if (::cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) return no_gpu;
    device_model model(4, 3 * block + 77);
    user_stream own;
    varve::checkpointer<varve::cuda::pinned_staging, varve::async<3>, varve::posix::sink> ck(
        model.state(), varve::cuda::pinned_staging(2 * block, block, {.snapshots = 2}), {}, varve::posix::sink(), dir);
    auto const broken = save_until_the_gpu_breaks(ck, model, own.stream, [](varve::ticket const& t) { return t.durable().wait(); });
    if (!broken) return wrong;
    // What kills a process where nobody catches LibTorch's exception.
    if (!unwinds) ::_exit(died);
    if (::cudaStreamSynchronize(own.stream) == cudaSuccess) return wrong;
    return broken->durable().wait() ? died : wrong;
}

void the_store_stays_clean(bool unwinds) {
    temporary_folder dir;
    auto const status = status_of_child([&] { return train_until_the_gpu_breaks(dir.path(), unwinds); });
    if (status == no_gpu) return skip("no GPU here");
    BOOST_TEST(status == died);

    auto const newest = newest_of_whole_files(dir.path());
    BOOST_TEST(newest >= 3u);
    BOOST_TEST(newest <= 4u);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_dies)

BOOST_AUTO_TEST_CASE(a_training_that_dies_of_a_cuda_error_in_mid_save_leaves_whole_checkpoints) { the_store_stays_clean(false); }

BOOST_AUTO_TEST_CASE(a_training_that_ends_after_a_cuda_error_leaves_whole_checkpoints) { the_store_stays_clean(true); }

BOOST_AUTO_TEST_SUITE_END()
