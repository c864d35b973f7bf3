#include <boost/test/unit_test.hpp>

#include <sys/wait.h>

#include "broken_device.hpp"
#include "device_model.hpp"
#include "files.hpp"
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

    std::uint64_t newest = 0;
    for (auto const& entry : std::filesystem::directory_iterator(dir.path())) {
        auto const name = entry.path().filename().string();
        if (!name.starts_with("step-")) continue;
        auto const step = std::stoull(name.substr(5, 12));
        newest = std::max<std::uint64_t>(newest, step);
        BOOST_TEST_CONTEXT(name) {
            varve::file_descriptor fd(::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC), varve::system_calls::kernel());
            BOOST_CHECK_NO_THROW(varve::safetensors{}.verify(fd.get(), 2));
            auto const size = std::filesystem::file_size(entry.path());
            std::vector<std::byte> last(4 * block);
            BOOST_TEST_REQUIRE(size > last.size());
            BOOST_TEST_REQUIRE(::pread(fd.get(), last.data(), last.size(), static_cast<off_t>(size - last.size())) ==
                               static_cast<ssize_t>(last.size()));
            BOOST_TEST(std::memcmp(last.data(), last.data() + 1, last.size() - 1) == 0);
            BOOST_TEST(std::to_integer<std::uint64_t>(last[0]) == step);
        }
    }
    BOOST_TEST(newest >= 3u);
    BOOST_TEST(newest <= 4u);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_dies)

BOOST_AUTO_TEST_CASE(a_training_that_dies_of_a_cuda_error_in_mid_save_leaves_whole_checkpoints) { the_store_stays_clean(false); }

BOOST_AUTO_TEST_CASE(a_training_that_ends_after_a_cuda_error_leaves_whole_checkpoints) { the_store_stays_clean(true); }

BOOST_AUTO_TEST_SUITE_END()
