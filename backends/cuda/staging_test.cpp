#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <array>
#include <future>

#include "pinned_training.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/scheduling/sync.hpp"
#include "varve/sink/memory.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;
using varve::cuda::pinned_staging;
constexpr std::size_t block = varve::block_unit_bytes;

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling, std::size_t pool_blocks, std::size_t snapshots, cudaStream_t stream, std::chrono::milliseconds delay) {
    varve_test::never_mixes_steps(pinned_staging(pool_blocks * block, block, {.snapshots = snapshots}), scheduling, stream, delay);
}

template <class Scheduling>
void never_mixes_steps(Scheduling scheduling) {
    if (!have_gpu()) return;
    user_stream own;
    for (std::size_t pool_blocks : {1, 2, 64})
        for (std::size_t snapshots : {0, 1, 2})
            for (auto stream : {cudaStream_t(nullptr), own.stream}) {
                BOOST_TEST_CONTEXT("pool of " << pool_blocks << ", snapshots " << snapshots)
                never_mixes_steps(scheduling, pool_blocks, snapshots, stream, 2ms);
            }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_pinned_staging)

BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_sync_save_mixes_steps) { never_mixes_steps(varve::sync{}); }
BOOST_AUTO_TEST_CASE(no_checkpoint_of_an_async_save_mixes_steps) { never_mixes_steps(varve::async<3>{}); }
BOOST_AUTO_TEST_CASE(no_checkpoint_of_a_layerwise_save_mixes_steps) { never_mixes_steps(varve::layerwise<3>{}); }

BOOST_AUTO_TEST_CASE(two_blocks_and_a_very_slow_sink_mix_no_steps) {
    if (!have_gpu()) return;
    user_stream own;
    never_mixes_steps(varve::layerwise<2>{}, 2, 0, own.stream, 40ms);
    never_mixes_steps(varve::async<2>{}, 2, 2, own.stream, 40ms);
}

BOOST_AUTO_TEST_CASE(a_copy_follows_the_work_that_was_recorded) {
    if (!have_gpu() || !can_hold_streams()) return;
    user_stream own;
    device_bytes bytes(block);
    varve::tensor t{"t", varve::dtype::U8, {static_cast<std::int64_t>(block)}, bytes.data, {}, varve::memory_kind::device};
    pinned_staging staging(block, block);
    std::stop_source never;
    auto buffer = staging.acquire(never.get_token());
    gate door;
    door.close();
    hold(own.stream, door);
    expect(::cudaMemsetAsync(bytes.data, 7, block, own.stream));
    auto token = staging.copy(buffer, std::array{varve::copy_range{&t, 0, block, 0}}, staging.record({own.stream}));
    auto done = std::async(std::launch::async, [&] { return token.wait(); });
    BOOST_TEST((done.wait_for(50ms) == std::future_status::timeout));
    door.open();
    BOOST_TEST(!done.get());
    BOOST_TEST((buffer.data()[0] == std::byte{7} && buffer.data()[block - 1] == std::byte{7}));
}

BOOST_AUTO_TEST_CASE(memory_that_another_process_has_too_is_page_locked_until_the_last_loan_ends) {
    if (!have_gpu()) return;
    constexpr std::size_t size = 3 * block;
    varve::file_descriptor fd(::memfd_create("pool", MFD_CLOEXEC), varve::system_calls::kernel());
    BOOST_REQUIRE(::ftruncate(fd.get(), size) == 0);
    void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
    BOOST_REQUIRE(memory != MAP_FAILED);
    std::shared_ptr<void> owner(memory, [](void* p) { ::munmap(p, size); });
    device_bytes bytes(block);
    varve::tensor t{"t", varve::dtype::U8, {static_cast<std::int64_t>(block)}, bytes.data, {}, varve::memory_kind::device};
    expect(::cudaMemset(bytes.data, 9, block));
    settle();
    varve::loan kept;
    auto locked = [&] {
        cudaPointerAttributes a{};
        expect(::cudaPointerGetAttributes(&a, memory));
        return a.type == cudaMemoryTypeHost;
    };
    {
        pinned_staging staging({static_cast<std::byte*>(memory), size}, block, owner);
        BOOST_TEST(staging.block_count() == 3u);
        BOOST_TEST(locked());
        std::stop_source never;
        auto buffer = staging.acquire(never.get_token());
        auto token = staging.copy(buffer, std::array{varve::copy_range{&t, 0, block, 0}}, staging.record({}));
        BOOST_TEST(!token.wait());
        // As the other process sees it.
        std::byte seen{};
        BOOST_TEST(::pread(fd.get(), &seen, 1, buffer.data() - static_cast<std::byte*>(memory) + static_cast<std::ptrdiff_t>(block) - 1) == 1);
        BOOST_TEST((seen == std::byte{9}));
        kept = buffer.lend();
    }
    BOOST_TEST(locked());
    kept.reset();
    BOOST_TEST(!locked());
}

BOOST_AUTO_TEST_CASE(the_time_that_a_stream_waits_for_a_copy_is_measured_where_it_was_asked_for) {
    if (!have_gpu() || !can_hold_streams()) return;
    user_stream own, other;
    device_bytes bytes(block);
    varve::tensor t{"t", varve::dtype::U8, {static_cast<std::int64_t>(block)}, bytes.data, {}, varve::memory_kind::device};
    std::stop_source never;
    for (bool measured : {false, true}) {
        pinned_staging staging(block, block, {.measure_waits = measured});
        auto buffer = staging.acquire(never.get_token());
        gate door;
        door.close();
        hold(other.stream, door);
        auto token = staging.copy(buffer, std::array{varve::copy_range{&t, 0, block, 0}}, staging.record({other.stream}));
        BOOST_TEST(!staging.order_after(token, {own.stream}));
        // Not yet over, and asking does not wait.
        BOOST_TEST(staging.gpu_wait_ns() == 0);
        std::this_thread::sleep_for(60ms);
        door.open();
        expect(::cudaStreamSynchronize(own.stream));
        auto const first = staging.gpu_wait_ns();
        if (!measured) {
            BOOST_TEST(first == 0);
            continue;
        }
        BOOST_TEST(first > 30'000'000);
        BOOST_TEST(first < 5'000'000'000);
        // What is done already costs next to nothing, and many of them are measured with few events.
        for (int i = 0; i < 3000; ++i) BOOST_TEST(!staging.order_after(token, {own.stream}));
        expect(::cudaStreamSynchronize(own.stream));
        auto const then = staging.gpu_wait_ns();
        BOOST_TEST(then >= first);
        BOOST_TEST(then - first < 3000 * 100'000);
    }
}

BOOST_AUTO_TEST_CASE(the_stalls_of_a_checkpointer_say_how_long_the_gpu_waited) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    checkpointer<varve::async<1>> ck(model.state(), pinned_staging(4 * block, block, {.measure_waits = true}), varve::async<1>{},
                                     checking_sink(model.state(), log));
    train_step(ck, model, 1, own.stream);
    for (std::size_t l = 0; l < model.layers(); ++l) ck.before_update(l, {own.stream});
    expect(::cudaStreamSynchronize(own.stream));
    BOOST_TEST(ck.stalls().gpu_wait_ns > 0);
    BOOST_TEST(ck.stalls().gpu_wait_ns < 5'000'000'000);
}

BOOST_AUTO_TEST_CASE(with_snapshots_training_goes_on_while_nothing_can_be_written) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model(5);
    auto log = std::make_shared<checking_sink::log>();
    log->door.close();
    {
        checkpointer<varve::async<2>> ck(model.state(), pinned_staging(block, block, {.snapshots = 2}), varve::async<2>{},
                                         checking_sink(model.state(), log));
        BOOST_TEST(ck.max_in_flight() == 2u);
        train_step(ck, model, 1, own.stream);
        train_step(ck, model, 2, own.stream);
        for (std::uint64_t step = 3; step <= 20; ++step)
            for (std::size_t l = 0; l < model.layers(); ++l) {
                ck.before_update(l, {own.stream});
                model.update(l, step, own.stream);
            }
        expect(::cudaStreamSynchronize(own.stream));
        BOOST_TEST(log->writes == 0u);
        log->door.open();
        ck.drain();
    }
    BOOST_TEST(log->steps == (std::vector<int>{1, 2}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_save_that_is_replaced_gives_its_snapshot_to_the_next) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model(5);
    auto log = std::make_shared<checking_sink::log>();
    log->door.close();
    varve::checkpointer_options options;
    options.busy = varve::when_busy::replace;
    checkpointer<varve::async<2>> ck(model.state(), pinned_staging(2 * block, block, {.snapshots = 2}), varve::async<2>{},
                                     checking_sink(model.state(), log), options);
    std::vector<varve::ticket> tickets;
    for (std::uint64_t step = 1; step <= 6; ++step) {
        tickets.push_back(train_step(ck, model, step, own.stream));
        std::this_thread::sleep_for(20ms);
    }
    log->door.open();
    ck.drain();
    BOOST_TEST(log->steps == (std::vector<int>{1, 6}), boost::test_tools::per_element());
    for (std::size_t i = 1; i + 1 < tickets.size(); ++i) BOOST_TEST((tickets[i].durable().wait() == varve::errc::replaced));
}

BOOST_AUTO_TEST_CASE(a_copy_in_pieces_is_whole_and_behind_what_was_taken) {
    if (!have_gpu() || !can_hold_streams()) return;
    constexpr std::size_t size = (std::size_t{28} << 20) + 9, first = 3, copied = (std::size_t{20} << 20) + 5, place = 4097;
    auto const bytes = numbered_bytes(size);
    device_bytes memory(size), source(size);
    expect(::cudaMemcpy(source.data, bytes.data(), size, cudaMemcpyDefault));
    settle();
    varve::state s;
    s.layers.push_back({"l", {{"t", varve::dtype::U8, {static_cast<std::int64_t>(size)}, memory.data, {}, varve::memory_kind::device}}});
    pinned_staging staging(8 * block, 8 * block, {.snapshots = 1});
    BOOST_TEST_REQUIRE(staging.prepare_snapshots(varve::safetensors{}.lay_out(s), s, 1) == 1u);
    user_stream training;
    gate door;
    for (int round = 0; round < 2; ++round) {
        auto snapshot = staging.acquire_snapshot();
        door.close();
        hold(training.stream, door);
        expect(::cudaMemcpyAsync(memory.data, source.data, size, cudaMemcpyDefault, training.stream));
        auto const taken = staging.take(snapshot, std::array{std::size_t{0}}, std::array{staging.record({training.stream})});
        std::stop_source never;
        auto buffer = staging.acquire(never.get_token());
        std::memset(buffer.data(), 0, 8 * block);
        auto const token = staging.copy(buffer, place, snapshot, first, copied, taken);
        auto done = std::async(std::launch::async, [&] { return token.wait(); });
        BOOST_TEST((done.wait_for(50ms) == std::future_status::timeout));
        door.open();
        BOOST_TEST(!done.get());
        BOOST_TEST(std::memcmp(buffer.data() + place, bytes.data() + first, copied) == 0);
        BOOST_TEST((buffer.data()[place - 1] == std::byte{0} && buffer.data()[place + copied] == std::byte{0}));
        expect(::cudaMemsetAsync(memory.data, 0, size, training.stream));
    }
}

BOOST_AUTO_TEST_CASE(a_copy_of_the_trainings_gets_through_while_a_snapshot_is_on_its_way) {
    if (!have_gpu()) return;
    if (sanitized()) return skip("a sanitizer takes the time that is measured here");
    using clock = std::chrono::steady_clock;
    user_stream training;
    device_model model(1, std::size_t{512} << 20);
    device_bytes loss(4);
    varve::cuda::page_locked host(4);
    auto const img = varve::safetensors{}.lay_out(model.state());
    constexpr std::size_t bytes = 16 * block;
    pinned_staging staging(img.data_bytes(), bytes, {.snapshots = 1});
    BOOST_TEST_REQUIRE(staging.prepare_snapshots(img, model.state(), 1) == 1u);
    auto snapshot = staging.acquire_snapshot();
    auto const taken = staging.take(snapshot, std::array{std::size_t{0}}, std::array{staging.record({training.stream})});
    BOOST_TEST(!taken.wait());
    std::stop_source never;
    std::vector<pinned_staging::buffer_type> buffers;
    for (std::size_t b = 0; b < staging.block_count(); ++b) buffers.push_back(staging.acquire(never.get_token()));
    std::vector<double> shares;
    for (int i = 0; i < 5; ++i) {
        varve::cuda::event last;
        for (std::size_t b = 0; b < buffers.size(); ++b) last = staging.copy(buffers[b], 0, snapshot, b * bytes, bytes, taken);
        auto const start = clock::now();
        expect(::cudaMemcpyAsync(host.data(), loss.data, 4, cudaMemcpyDefault, training.stream));
        expect(::cudaStreamSynchronize(training.stream));
        auto const through = clock::now() - start;
        BOOST_TEST(!last.wait());
        shares.push_back(std::chrono::duration<double>(through) / (clock::now() - start));
    }
    // 10 ms in all; it took all of them where the copies were in one stream.
    BOOST_TEST(*std::ranges::min_element(shares) < 0.5);
}

BOOST_AUTO_TEST_CASE(strided_tensors_arrive_in_row_major_order_also_from_a_snapshot) {
    if (!have_gpu()) return;
    turned_matrix const turned(1500, 1001);
    std::uint8_t odd[3] = {1, 2, 3};
    for (std::size_t snapshots : {0, 1}) {
        varve::state s;
        s.layers.push_back({"l", {{"a_odd", varve::dtype::U8, {3}, odd, {}}, turned.tensor}});
        varve::memory_sink sink;
        varve::checkpointer<pinned_staging, varve::async<1>, varve::memory_sink> ck(s, pinned_staging(block, block, {.snapshots = snapshots}), {},
                                                                                    sink);
        BOOST_TEST(!ck.save(1).durable().wait());
        auto img = varve::safetensors{}.lay_out(s);
        auto bytes = sink.newest();
        for (auto const& placed : img.tensors)
            if (s.layers[0].tensors[placed.tensor].name == "turned")
                BOOST_TEST(std::memcmp(bytes->data() + placed.offset_bytes, turned.expected.data(), turned.expected.size()) == 0);
    }
}

BOOST_AUTO_TEST_CASE(a_pool_that_cannot_be_page_locked_says_so_and_leaves_no_error_behind) {
    if (!have_gpu()) return;
    // Each region asks for more than any address space has.
    auto too_large = std::size_t{1} << 50;
    BOOST_CHECK_EXCEPTION(pinned_staging(too_large, too_large), varve::error, [](auto const& e) { return e.code() == std::errc::not_enough_memory; });
    BOOST_TEST(::cudaPeekAtLastError() == cudaSuccess);
}

BOOST_AUTO_TEST_CASE(without_gpu_memory_for_a_snapshot_saves_work_and_say_why) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    auto saves = [&](pinned_staging staging) {
        auto img = varve::safetensors{}.lay_out(model.state());
        BOOST_TEST(staging.prepare_snapshots(img, model.state(), 2) == 0u);
        BOOST_TEST(staging.describe().find("no snapshot: ") != std::string::npos, staging.describe());
        checkpointer<varve::async<2>> ck(model.state(), std::move(staging), varve::async<2>{}, checking_sink(model.state(), log));
        BOOST_TEST(!train_step(ck, model, 4, own.stream).durable().wait());
    };
    saves(pinned_staging(2 * block, block, {.snapshots = 2, .snapshot_share = 1e-9}));
    pinned_staging made_before(2 * block, block, {.snapshots = 2, .snapshot_share = 1e9});
    std::vector<std::unique_ptr<device_bytes>> all;
    for (std::size_t piece = std::size_t{64} << 30; piece >= block;) {
        try {
            all.push_back(std::make_unique<device_bytes>(piece));
        } catch (varve::error const&) {
            piece /= 2;
        }
    }
    saves(std::move(made_before));
    BOOST_TEST(::cudaPeekAtLastError() == cudaSuccess);
    all.clear();
    pinned_staging staging(2 * block, block, {.snapshots = 2});
    BOOST_TEST(staging.prepare_snapshots(varve::safetensors{}.lay_out(model.state()), model.state(), 2) == 2u);
    BOOST_TEST(staging.describe().find("2 snapshots in ") != std::string::npos, staging.describe());
    BOOST_TEST((staging.digests_snapshots() == (staging.describe().find("hashed there") != std::string::npos)));
}

BOOST_AUTO_TEST_CASE(a_state_without_a_gpu_tensor_is_saved_without_a_snapshot) {
    if (!have_gpu()) return;
    std::vector<std::byte> bytes(block + 77, std::byte{3});
    varve::state s;
    s.layers.push_back({"l", {{"t", varve::dtype::U8, {static_cast<std::int64_t>(bytes.size())}, bytes.data(), {}}}});
    auto log = std::make_shared<checking_sink::log>();
    checkpointer<varve::async<2>> ck(s, pinned_staging(block, block, {.snapshots = 2}), varve::async<2>{}, checking_sink(s, log));
    BOOST_TEST(!ck.save(1).durable().wait());
    BOOST_TEST(log->steps == std::vector<int>{3}, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_SUITE_END()
