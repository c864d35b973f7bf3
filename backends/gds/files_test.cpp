#include <boost/test/unit_test.hpp>

#include <optional>
#include <semaphore>

#include "device_model.hpp"
#include "failing_calls.hpp"
#include "files.hpp"
#include "scratch_folder.hpp"
#include "varve/conformance/sink.hpp"
#include "varve/gds/sink.hpp"
#include "varve/gds/staging.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/scheduling/sync.hpp"

// With the real cuFile, on a GPU.

namespace {

using namespace varve_test;
using varve::gds::sink;
using varve::gds::staging;
constexpr std::size_t block = varve::block_unit_bytes;

bool have_cufile() {
    if (!have_gpu()) return false;
    auto why = sink::available();
    if (why) skip("no cuFile here: " + why.message());
    return !why;
}

struct waiting {
    std::binary_semaphore came{0};
    std::error_code error{};
    varve::completion done() {
        return {[](void* context, std::error_code ec) noexcept {
                    auto& w = *static_cast<waiting*>(context);
                    w.error = ec;
                    w.came.release();
                },
                this};
    }
    std::error_code wait() {
        came.acquire();
        return error;
    }
};

/// Steps 1 to 5 through files, each byte of which says its step; the newest comes back into the GPU.
template <class Scheduling>
void saves_and_comes_back(Scheduling scheduling, std::size_t pool_blocks, std::size_t snapshots) {
    scratch_folder dir;
    device_model model(4, 3 * block + 77);
    user_stream own;
    varve::checkpointer<staging, Scheduling, sink> ck(model.state(), staging(pool_blocks * block, block, {.snapshots = snapshots}), scheduling,
                                                      sink(), dir.path());
    auto update = [&](std::uint64_t step) {
        for (std::size_t l = 0; l < model.layers(); ++l) {
            ck.before_update(l, {own.stream});
            model.update(l, step, own.stream);
            ck.layer_ready(l, {own.stream});
        }
    };
    for (std::uint64_t step = 1; step <= 5; ++step) {
        ck.begin(step);
        update(step);
        ck.seal({}, {own.stream});
    }
    ck.drain();
    BOOST_TEST_MESSAGE(ck.describe_sink());
    BOOST_TEST_MESSAGE(ck.staging().describe());
    auto img = varve::safetensors{}.lay_out(model.state());
    for (auto const& c : ck.files().checkpoints()) {
        auto fd = open_file(ck.files().path() / c.name);
        BOOST_CHECK_NO_THROW(varve::safetensors{}.verify(fd.get(), 2));
        std::vector<std::byte> bytes(img.data_bytes());
        BOOST_REQUIRE(::pread(fd.get(), bytes.data(), bytes.size(), static_cast<off_t>(img.header_bytes)) == static_cast<ssize_t>(bytes.size()));
        BOOST_TEST(std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
        BOOST_TEST(std::to_integer<std::uint64_t>(bytes[0]) == c.step);
    }
    update(9);
    auto restored = ck.restore({}, {}, {own.stream});
    BOOST_REQUIRE(restored.has_value());
    BOOST_TEST(restored->step == 5u);
    for (auto const& l : model.state().layers)
        for (auto const& t : l.tensors) {
            std::vector<std::byte> bytes(t.size_bytes());
            expect(::cudaMemcpy(bytes.data(), t.data, bytes.size(), cudaMemcpyDefault));
            BOOST_TEST(std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{5}; }), t.name);
        }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(gds_files)

BOOST_AUTO_TEST_CASE(the_gds_sink_keeps_the_laws) {
    if (!have_cufile()) return;
    scratch_folder folder;
    for (bool direct : {true, false}) {
        varve::conformance::sink_fixture<sink> fixture{[&] { return sink({.direct = direct}); },
                                                       [&](int index, std::uint64_t size) { return folder.request(index, size); },
                                                       [&](auto&, int index) { return std::optional(folder.content(index)); }};
        for (auto const& law : varve::conformance::check_sink(fixture)) BOOST_ERROR(law);
    }
}

BOOST_AUTO_TEST_CASE(gpu_memory_goes_to_a_file_and_back_registered_or_not) {
    if (!have_cufile()) return;
    scratch_folder folder;
    for (bool registered : {true, false})
        for (bool direct : {true, false})
            for (std::size_t size : {std::size_t{100}, std::size_t{4096}, block, 3 * block + 4096 + 77}) {
                std::vector<std::byte> bytes(size);
                for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 31 + i / 509);
                varve::cuda::device_bytes from((size + 4095) / 4096 * 4096), to((size + 4095) / 4096 * 4096);
                expect(::cudaMemcpy(from.data(), bytes.data(), size, cudaMemcpyDefault));
                expect(::cudaMemset(to.data(), 0, to.bytes().size()));
                settle();
                sink s({.writer_threads = 3, .direct = direct, .stripe_bytes = 1u << 20});
                int slot = registered ? s.register_memory(from.bytes()) : varve::unregistered;
                auto target = s.open(folder.request(0, size));
                waiting written, read;
                target.write(0, {from.data(), size, varve::memory_kind::device, slot}, written.done());
                BOOST_TEST(!written.wait(), written.error.message());
                BOOST_TEST(!target.sync());
                BOOST_TEST((folder.content(0) == bytes));
                target.read(0, to.bytes().first(size), varve::memory_kind::device, varve::unregistered, read.done());
                BOOST_TEST(!read.wait(), read.error.message());
                std::vector<std::byte> back(size);
                expect(::cudaMemcpy(back.data(), to.data(), size, cudaMemcpyDefault));
                BOOST_TEST((back == bytes));
                if (size > block) BOOST_TEST_MESSAGE(s.describe());
            }
}

BOOST_AUTO_TEST_CASE(describe_says_nvidia_fs_or_compatibility_mode) {
    if (!have_cufile()) return;
    auto text = sink().describe();
    BOOST_TEST_MESSAGE(text);
    BOOST_TEST(text.find("cuFile, ") == 0u, text);
    BOOST_TEST((text.find("cuFile, nvidia-fs ") == 0u || text.find("cuFile, compatibility mode (") == 0u), text);
}

BOOST_AUTO_TEST_CASE(a_sync_save_is_whole_and_comes_back) {
    if (have_cufile()) saves_and_comes_back(varve::sync{}, 4, 0);
}
BOOST_AUTO_TEST_CASE(async_saves_through_two_blocks_are_whole_and_come_back) {
    if (!have_cufile()) return;
    saves_and_comes_back(varve::async<2>{}, 2, 0);
    saves_and_comes_back(varve::async<2>{}, 2, 2);
}
BOOST_AUTO_TEST_CASE(layerwise_saves_through_two_blocks_are_whole_and_come_back) {
    if (!have_cufile()) return;
    saves_and_comes_back(varve::layerwise<2>{}, 2, 0);
    saves_and_comes_back(varve::layerwise<2>{}, 2, 2);
}

BOOST_AUTO_TEST_CASE(a_sync_that_fails_fails_the_save_and_not_the_next) {
    if (!have_cufile()) return;
    scratch_folder dir;
    device_model model(2);
    user_stream own;
    failing_calls calls;
    calls.on_sync = [](int n) { return n == 0 ? EIO : 0; };
    varve::checkpointer<staging, varve::async<2>, sink> ck(model.state(), staging(4 * block, block), {}, sink({.calls = &calls}), dir.path());
    auto save = [&](std::uint64_t step) {
        ck.before_update_all({own.stream});
        for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, step, own.stream);
        return ck.save(step, {}, {own.stream}).durable().wait();
    };
    BOOST_TEST((save(1) == std::error_code(EIO, std::system_category())));
    BOOST_TEST(!save(2));
}

BOOST_AUTO_TEST_SUITE_END()
