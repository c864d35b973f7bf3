#include <boost/test/unit_test.hpp>

#include <unistd.h>
#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include "breaking_run.hpp"
#include "monitored_runs.hpp"
#include "varve/asio/monitor_sink.hpp"
#include "varve/asio/shared_pool.hpp"
#include "varve/cuda/pinned_staging.hpp"
#include "varve/cuda/shared_memory.hpp"
#include "varve/gds/staging.hpp"
#include "varve/scheduling/async.hpp"

// In an executable of its own: a process that has used CUDA cannot hand it on to a child.

namespace varve_test {

namespace {

namespace va = varve::asio;
constexpr std::size_t block = varve::block_unit_bytes, pool_blocks = 64;

std::shared_ptr<va::shared_pool> pool_in_gpu_memory() {
    auto memory = std::make_shared<varve::cuda::shared_memory>(pool_blocks * block, block);
    std::vector<va::shared_pool::region> regions;
    for (auto& r : memory->regions()) regions.push_back({r.memory, std::move(r.descriptor)});
    auto const device = memory->device();
    return std::make_shared<va::shared_pool>(std::move(regions), block, device, std::move(memory));
}
std::shared_ptr<va::shared_pool> pool_in_host_memory() { return std::make_shared<va::shared_pool>(pool_blocks * block, block); }

/// A training that dies of its GPU, which breaks before its fifth save.
template <class Staging>
int train_until_the_gpu_breaks(va::address const& monitor, std::string const& store, std::shared_ptr<va::shared_pool> (*make_pool)()) {
    int gpus = 0;
    if (::cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) return no_gpu;
    device_model model(4, 3 * block + 77);
    user_stream own;
    auto const pool = make_pool();
    varve::checkpointer<Staging, varve::async<3>, va::monitor_sink> ck(model.state(), Staging(pool->memory(), block, pool, {.snapshots = 2}), {},
                                                                       va::monitor_sink(monitor, store, {.pool = pool}));
    if (!save_until_the_gpu_breaks(ck, model, own.stream, [](varve::ticket const& t) { return t.crash_safe().wait(); })) return wrong;
    if (::cudaStreamSynchronize(own.stream) == cudaSuccess) return wrong;
    ::_exit(died);
}

template <class Staging>
void the_monitor_commits_what_was_whole(std::shared_ptr<va::shared_pool> (*make_pool)()) {
    if (!have_monitor()) return;
    workplace w;
    auto const socket = w.folder / "s", store = w.folder / "run";
    running_tool monitor({"monitor", "--dir", w.folder.path().string(), "--unix", socket});
    BOOST_TEST_REQUIRE(answers({"--unix", socket}));
    auto const status = status_of_child([&] { return train_until_the_gpu_breaks<Staging>(va::parse_address("unix:" + socket), store, make_pool); });
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.ends_within(20s));
    BOOST_TEST(monitor.wait().code == 0);
    if (status == no_gpu) return skip("no GPU here");
    BOOST_TEST(status == died);
    auto const newest = newest_of_whole_files(store);
    BOOST_TEST(newest >= 3u);
    BOOST_TEST(newest <= 4u);
    expect_whole(store);
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_trainer_that_dies_of_a_cuda_error_loses_nothing_crash_safe_of_a_pinned_pool) {
    the_monitor_commits_what_was_whole<varve::cuda::pinned_staging>(pool_in_host_memory);
}

BOOST_AUTO_TEST_CASE(a_trainer_that_dies_of_a_cuda_error_loses_nothing_crash_safe_of_a_pool_in_gpu_memory) {
    the_monitor_commits_what_was_whole<varve::gds::staging>(pool_in_gpu_memory);
}

}  // namespace varve_test
