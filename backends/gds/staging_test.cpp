#include <boost/test/unit_test.hpp>

#include <array>
#include <future>

#include "device_model.hpp"
#include "varve/conformance/snapshots.hpp"
#include "varve/conformance/staging.hpp"
#include "varve/detail/digest.hpp"
#include "varve/gds/staging.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/scheduling/sync.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::gds::staging;
constexpr std::size_t block = varve::block_unit_bytes;

template <class Scheduling>
using checkpointer = varve::checkpointer<staging, Scheduling, checking_sink>;

varve::conformance::staging_fixture<staging> fixture(staging::order_type order) {
    varve::conformance::staging_fixture<staging> f{.make = [](std::size_t pool_bytes, std::size_t block_bytes) {
        staging s(pool_bytes, block_bytes, {.snapshots = 2});
        // The laws fetch whole buffers, also what was not copied there.
        for (auto r : s.regions()) expect(::cudaMemset(r.data(), 0, r.size()));
        settle();
        return s;
    }};
    f.order = order;
    f.fetch = [](auto const& buffer, std::span<std::byte> out) { expect(::cudaMemcpy(out.data(), buffer.data(), out.size(), cudaMemcpyDefault)); };
    return f;
}
void expect_lawful(varve::conformance::staging_fixture<staging> const& f) {
    for (auto const& law : varve::conformance::check_staging(f)) BOOST_ERROR(law);
}

std::vector<std::byte> fetch(std::byte const* data, std::size_t size) {
    std::vector<std::byte> out(size);
    expect(::cudaMemcpy(out.data(), data, size, cudaMemcpyDefault));
    return out;
}

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling, std::size_t pool_blocks, std::size_t snapshots, cudaStream_t stream, std::chrono::milliseconds delay) {
    varve_test::never_mixes_steps(staging(pool_blocks * block, block, {.snapshots = snapshots}), scheduling, stream, delay);
}

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling) {
    if (!have_gpu()) return;
    user_stream own;
    for (std::size_t pool_blocks : {1, 2, 64})
        for (std::size_t snapshots : {0, 2}) BOOST_TEST_CONTEXT("pool of " << pool_blocks << ", snapshots " << snapshots)
    never_mixes_steps(scheduling, pool_blocks, snapshots, own.stream, 2ms);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(gds_staging)

BOOST_AUTO_TEST_CASE(gds_staging_keeps_the_laws_for_tensors_in_gpu_memory) {
    if (!have_gpu()) return;
    user_stream own;
    for (auto stream : {cudaStream_t(nullptr), own.stream}) {
        std::vector<std::unique_ptr<device_bytes>> placed;
        auto f = fixture({stream});
        f.place = [&](std::span<std::byte> bytes) {
            placed.push_back(std::make_unique<device_bytes>(bytes.size()));
            expect(::cudaMemcpy(placed.back()->data, bytes.data(), bytes.size(), cudaMemcpyDefault));
            settle();
            return placed.back()->data;
        };
        expect_lawful(f);
        for (auto const& law : varve::conformance::check_snapshots(f)) BOOST_ERROR(law);
    }
}

BOOST_AUTO_TEST_CASE(gds_staging_keeps_the_laws_for_tensors_in_host_memory) {
    if (!have_gpu()) return;
    auto f = fixture({});
    f.tensors = varve::memory_kind::host;
    expect_lawful(f);
}

BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_sync_save_mixes_steps) { never_mixes_steps(varve::sync{}); }
BOOST_AUTO_TEST_CASE(no_checkpoint_of_an_async_save_mixes_steps) { never_mixes_steps(varve::async<3>{}); }
BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_layerwise_save_mixes_steps) { never_mixes_steps(varve::layerwise<3>{}); }

BOOST_AUTO_TEST_CASE(two_blocks_and_a_very_slow_sink_mix_no_steps) {
    if (!have_gpu()) return;
    user_stream own;
    never_mixes_steps(varve::layerwise<2>{}, 2, 0, own.stream, 40ms);
}

BOOST_AUTO_TEST_CASE(host_tensors_have_been_read_when_copy_returns_though_the_stream_is_held_back) {
    if (!have_gpu() || !can_hold_streams()) return;
    user_stream own;
    // Many small ones and a large one, with something from the GPU between: more than all the pieces hold.
    std::vector<std::byte> small(5, std::byte{3}), large(6u << 20, std::byte{4});
    device_bytes gpu(1000);
    varve::tensor ts{"small", varve::dtype::U8, {5}, small.data(), {}};
    varve::tensor tl{"large", varve::dtype::U8, {static_cast<std::int64_t>(large.size())}, large.data(), {}};
    varve::tensor tg{"gpu", varve::dtype::U8, {1000}, gpu.data, {}, varve::memory_kind::device};
    staging s(2 * block, 2 * block);
    std::stop_source never;
    auto buffer = s.acquire(never.get_token());
    gate door;
    door.close();
    hold(own.stream, door);
    expect(::cudaMemsetAsync(gpu.data, 7, 1000, own.stream));
    std::vector<varve::copy_range> ranges;
    for (std::size_t i = 0; i < 100; ++i) ranges.push_back({&ts, 0, 5, 5 * i});
    ranges.push_back({&tg, 0, 1000, 500});
    ranges.push_back({&tl, 0, large.size(), 1500});
    auto token = s.copy(buffer, ranges, s.record({own.stream}));
    std::fill(small.begin(), small.end(), std::byte{0});
    std::fill(large.begin(), large.end(), std::byte{0});
    auto done = std::async(std::launch::async, [&] { return token.wait(); });
    BOOST_TEST((done.wait_for(50ms) == std::future_status::timeout));
    door.open();
    BOOST_TEST(!done.get());
    auto found = fetch(buffer.data(), 1500 + large.size());
    auto all = [&](std::size_t from, std::size_t to, int value) {
        return std::all_of(found.begin() + static_cast<std::ptrdiff_t>(from), found.begin() + static_cast<std::ptrdiff_t>(to),
                           [&](std::byte b) { return b == std::byte(value); });
    };
    BOOST_TEST((all(0, 500, 3) && all(500, 1500, 7) && all(1500, 1500 + large.size(), 4)));
}

BOOST_AUTO_TEST_CASE(digests_of_a_buffer_are_the_librarys_from_several_threads) {
    if (!have_gpu()) return;
    staging s(2 * block, block);
    std::stop_source never;
    auto first = s.acquire(never.get_token()), second = s.acquire(never.get_token());
    std::vector<std::byte> bytes(block - 77);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
    for (auto* b : {&first, &second}) expect(::cudaMemcpy(b->data(), bytes.data(), bytes.size(), cudaMemcpyDefault));
    settle();
    std::vector<std::uint64_t> expected(varve::detail::chunk_count(bytes.size()));
    varve::detail::chunk_digests(bytes, expected);
    std::vector<std::future<bool>> threads;
    for (int t = 0; t < 4; ++t)
        threads.push_back(std::async(std::launch::async, [&, t] {
            bool good = true;
            for (int i = 0; i < 20; ++i) {
                std::vector<std::uint64_t> out(expected.size() + 1, 42);
                good = good && !s.digest(t % 2 ? first : second, bytes.size(), out) && out.back() == 42;
                out.pop_back();
                good = good && out == expected;
            }
            return good;
        }));
    for (auto& t : threads) BOOST_TEST(t.get());
}

BOOST_AUTO_TEST_CASE(a_stream_that_is_captured_is_refused_and_the_capture_goes_on) {
    if (!have_gpu()) return;
    if (initchecked()) return skip("behind a capture initcheck takes bytes for unwritten that are found right below");
    user_stream own;
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    checkpointer<varve::async<2>> ck(model.state(), staging(2 * block, block), varve::async<2>{}, checking_sink(model.state(), log));
    cudaGraph_t graph = nullptr;
    expect(::cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeThreadLocal));
    model.update(0, 1, own.stream);
    auto refused = ck.save(1, {}, {own.stream});
    BOOST_TEST((refused.durable().wait() == varve::errc::unsupported));
    expect(::cudaStreamEndCapture(own.stream, &graph));
    expect(::cudaGraphDestroy(graph));
    for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, 2, own.stream);
    BOOST_TEST(!ck.save(2, {}, {own.stream}).durable().wait());
    BOOST_TEST(log->steps == std::vector<int>{2}, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_pool_that_the_gpu_has_no_room_for_says_so_and_leaves_no_error_behind) {
    if (!have_gpu()) return;
    auto too_large = std::size_t{1} << 46;
    BOOST_CHECK_EXCEPTION(staging(too_large, std::size_t{1} << 30), varve::error,
                          [](auto const& e) { return e.code() == std::errc::not_enough_memory; });
    BOOST_TEST(::cudaPeekAtLastError() == cudaSuccess);
    staging s(3 * block, block, {.snapshots = 1});
    BOOST_TEST(s.describe().find("memory of GPU 0, 3 blocks of 4 MiB") == 0u, s.describe());
    BOOST_TEST(s.gpu_bytes() == 3 * block);
}

BOOST_AUTO_TEST_SUITE_END()
