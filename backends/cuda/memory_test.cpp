#include <boost/test/unit_test.hpp>

#include <dlfcn.h>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "device_model.hpp"
#include "varve/scheduling/layerwise.hpp"

// Every call by which varve takes memory of CUDA's, page-locked memory, GPU memory, events and streams, is refused once, and every
// copy, every record of an event and every wait for one. The functions below stand before those of the runtime library, in this program alone.

namespace {

std::atomic<int> until_failure{0};  ///< 0: none
std::atomic<bool> has_failed{false};

bool fails_now() noexcept {
    auto left = until_failure.load();
    while (left > 0 && !until_failure.compare_exchange_weak(left, left - 1)) {
    }
    if (left != 1) return false;
    has_failed = true;
    return true;
}

template <class Function>
Function* next(char const* name) noexcept {
    return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

cudaError_t CUDARTAPI cudaHostAlloc(void** memory, std::size_t size, unsigned flags) {
    static auto* const real = next<cudaError_t(void**, std::size_t, unsigned)>("cudaHostAlloc");
    return fails_now() ? cudaErrorMemoryAllocation : real(memory, size, flags);
}
cudaError_t CUDARTAPI cudaMallocAsync(void** memory, std::size_t size, cudaStream_t stream) {
    static auto* const real = next<cudaError_t(void**, std::size_t, cudaStream_t)>("cudaMallocAsync");
    return fails_now() ? cudaErrorMemoryAllocation : real(memory, size, stream);
}
cudaError_t CUDARTAPI cudaEventCreate(cudaEvent_t* event) {
    static auto* const real = next<cudaError_t(cudaEvent_t*)>("cudaEventCreate");
    return fails_now() ? cudaErrorMemoryAllocation : real(event);
}
cudaError_t CUDARTAPI cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    static auto* const real = next<cudaError_t(cudaEvent_t*, unsigned)>("cudaEventCreateWithFlags");
    return fails_now() ? cudaErrorMemoryAllocation : real(event, flags);
}
cudaError_t CUDARTAPI cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    static auto* const real = next<cudaError_t(cudaStream_t*, unsigned, int)>("cudaStreamCreateWithPriority");
    return fails_now() ? cudaErrorMemoryAllocation : real(stream, flags, priority);
}
cudaError_t CUDARTAPI cudaMemcpyAsync(void* to, void const* from, std::size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
    static auto* const real = next<cudaError_t(void*, void const*, std::size_t, cudaMemcpyKind, cudaStream_t)>("cudaMemcpyAsync");
    return fails_now() ? cudaErrorMemoryAllocation : real(to, from, size, kind, stream);
}
cudaError_t CUDARTAPI cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    static auto* const real = next<cudaError_t(cudaEvent_t, cudaStream_t)>("cudaEventRecord");
    return fails_now() ? cudaErrorMemoryAllocation : real(event, stream);
}

cudaError_t CUDARTAPI cudaHostRegister(void* memory, std::size_t size, unsigned flags) {
    static auto* const real = next<cudaError_t(void*, std::size_t, unsigned)>("cudaHostRegister");
    return fails_now() ? cudaErrorMemoryAllocation : real(memory, size, flags);
}
cudaError_t CUDARTAPI cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    static auto* const real = next<cudaError_t(cudaStream_t, cudaEvent_t, unsigned)>("cudaStreamWaitEvent");
    return fails_now() ? cudaErrorMemoryAllocation : real(stream, event, flags);
}

}  // extern "C"

namespace {

using namespace varve_test;
using varve::cuda::pinned_staging;
constexpr std::size_t block = varve::block_unit_bytes;

bool out_of_memory(std::error_code ec) { return ec == std::errc::not_enough_memory; }

enum class pool { own, given };

pinned_staging staging_with(pool kind, varve::cuda::pinned_staging_options const& options) {
    if (kind == pool::own) return pinned_staging(2 * block, block, options);
    auto* const memory = static_cast<std::byte*>(std::aligned_alloc(4096, 2 * block));
    BOOST_TEST_REQUIRE(memory);
    std::shared_ptr<void> owner(memory, [](void* p) { std::free(p); });
    return pinned_staging({memory, 2 * block}, block, std::move(owner), options);
}

/// Three saves; whatever memory is refused, each ends whole or says that there was none. Returns whether all are whole.
bool saves_three_steps(device_model& model, pool kind, std::size_t snapshots, cudaStream_t stream) {
    auto log = std::make_shared<checking_sink::log>();
    std::vector<int> durable;
    std::vector<varve::ticket> tickets;
    try {
        varve::checkpointer<pinned_staging, varve::layerwise<2>, checking_sink> ck(
            model.state(), staging_with(kind, {.snapshots = snapshots, .measure_waits = true}), {}, checking_sink(model.state(), log));
        for (std::uint64_t step = 1; step <= 3; ++step) {
            ck.begin(step);
            for (std::size_t l = 0; l < model.layers(); ++l) {
                ck.before_update(l, {stream});
                model.update(l, step, stream);
                ck.layer_ready(l, {stream});
            }
            tickets.push_back(ck.seal({}, {stream}));
        }
        ck.drain();
    } catch (varve::error const& e) {
        BOOST_TEST(out_of_memory(e.code()), e.what());
    }
    for (auto const& t : tickets) {
        auto const ec = t.durable().wait();
        BOOST_TEST((!ec || out_of_memory(ec)), ec.message());
        if (!ec) durable.push_back(static_cast<int>(t.step()));
    }
    BOOST_TEST(log->steps == durable, boost::test_tools::per_element());
    return durable.size() == 3u;
}

/// Copies of a snapshot, each of three pieces: what arrives is whole, also after one that failed.
bool copies_in_pieces(cudaStream_t stream) {
    constexpr std::size_t size = 6 * block;
    device_bytes memory(size);
    varve::state s;
    s.layers.push_back({"l", {{"t", varve::dtype::U8, {static_cast<std::int64_t>(size)}, memory.data, {}, varve::memory_kind::device}}});
    int whole = 0;
    try {
        pinned_staging staging(size, size, {.snapshots = 1});
        if (staging.prepare_snapshots(varve::safetensors{}.lay_out(s), s, 1) == 0) return false;
        std::stop_source never;
        for (int value = 1; value <= 3; ++value) {
            expect(::cudaMemsetAsync(memory.data, value, size, stream));
            auto snapshot = staging.acquire_snapshot();
            auto buffer = staging.acquire(never.get_token());
            std::memset(buffer.data(), 0, size);
            auto const taken = staging.take(snapshot, std::array{std::size_t{0}}, std::array{staging.record({stream})});
            auto const failed = staging.copy(buffer, 0, snapshot, 0, size, taken).wait();
            BOOST_TEST((!failed || out_of_memory(failed)), failed.message());
            // Where it failed nothing writes to the buffer any more; what else was asked for is done before the next round.
            expect(::cudaDeviceSynchronize());
            if (failed) continue;
            BOOST_TEST((buffer.data()[0] == static_cast<std::byte>(value)));
            BOOST_TEST(std::memcmp(buffer.data(), buffer.data() + 1, size - 1) == 0);
            ++whole;
        }
    } catch (varve::error const& e) {
        BOOST_TEST(out_of_memory(e.code()), e.what());
        return false;
    }
    BOOST_TEST(whole >= 2);
    return whole == 3;
}

/// The way of a restore, there and back, and of a reader without one.
bool transfers(device_model& model, cudaStream_t stream) {
    auto const& t = model.state().layers[0].tensors[0];
    std::vector<std::byte> bytes(t.size_bytes());
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7);
    try {
        varve::cuda::transfer way(stream);
        write_all(way, t, bytes);
        way.finish();
        BOOST_TEST((bytes == read_all(way, {&t})));
        varve::cuda::transfer back(stream);
        BOOST_TEST((bytes == read_all(back, {&t})));
        return true;
    } catch (varve::error const& e) {
        BOOST_TEST(out_of_memory(e.code()), e.what());
        return false;
    }
}

/// Refuses the first piece of memory, the second, ... until `run` gets all that it asks for.
template <class Run>
void each_is_refused(Run run) {
    // A sanitizer takes its time over each call.
    int const stride = sanitized() ? 29 : 1;
    for (int n = 1;; n += stride) {
        has_failed = false;
        until_failure = n;
        bool const whole = run();
        until_failure = 0;
        BOOST_TEST(::cudaPeekAtLastError() == cudaSuccess);
        if (!has_failed) {
            BOOST_TEST(whole);
            BOOST_TEST(n > 1);
            return;
        }
        BOOST_TEST_REQUIRE(n < 10'000);
    }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_memory)

BOOST_AUTO_TEST_CASE(whatever_memory_is_refused_saves_are_whole_or_say_so) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model;
    for (auto kind : {pool::own, pool::given})
        for (std::size_t snapshots : {0, 2}) each_is_refused([&] { return saves_three_steps(model, kind, snapshots, own.stream); });
}

BOOST_AUTO_TEST_CASE(whatever_is_refused_a_copy_in_pieces_is_whole_or_says_so) {
    if (!have_gpu()) return;
    user_stream own;
    each_is_refused([&] { return copies_in_pieces(own.stream); });
}

BOOST_AUTO_TEST_CASE(whatever_memory_is_refused_a_restore_is_right_or_says_so) {
    if (!have_gpu()) return;
    user_stream own;
    device_model model;
    each_is_refused([&] { return transfers(model, own.stream); });
}

BOOST_AUTO_TEST_SUITE_END()
