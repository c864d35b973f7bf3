#include <boost/test/unit_test.hpp>

#include <memory>
#include <optional>
#include <semaphore>

#include "device_staging.hpp"
#include "failing_calls.hpp"
#include "fake_cufile.hpp"
#include "plain_sinks.hpp"
#include "scratch_folder.hpp"
#include "sink_faults.hpp"
#include "support.hpp"
#include "varve/checkpointer.hpp"
#include "varve/conformance/sink.hpp"
#include "varve/gds/sink.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"

// All of this runs without a GPU: cuFile stands behind a seam.

namespace {

using namespace varve_test;
using varve::gds::sink;

constexpr int not_supported = 5008;  // CU_FILE_IO_NOT_SUPPORTED

std::error_code write_gpu(sink::target_type& target, std::uint64_t offset, std::span<std::byte const> bytes, int slot = varve::unregistered) {
    struct answer {
        std::binary_semaphore came{0};
        std::error_code error{};
    } a;
    target.write(offset, {bytes.data(), bytes.size(), varve::memory_kind::device, slot},
                 {[](void* context, std::error_code error) noexcept {
                      auto& to = *static_cast<answer*>(context);
                      to.error = error;
                      to.came.release();
                  },
                  &a});
    a.came.acquire();
    return a.error;
}

/// O_DIRECT may not be given where the tests run: what goes which way is then not to be seen.
bool is_direct(sink const& s) { return s.describe().find(", direct,") != std::string::npos; }

struct gpu_image {
    std::shared_ptr<fake_cufile> gpu = std::make_shared<fake_cufile>();
    scratch_folder folder;
    varve::detail::aligned_bytes bytes = some_bytes((9u << 20) + 4096 + 77);
};

}  // namespace

BOOST_AUTO_TEST_SUITE(gds_sink)

BOOST_AUTO_TEST_CASE(the_sink_keeps_the_laws_for_host_memory) {
    scratch_folder folder;
    for (bool direct : {true, false}) {
        varve::conformance::sink_fixture<sink> fixture{[&] { return sink({.direct = direct, .gpu = std::make_shared<fake_cufile>()}); },
                                                       [&](int index, std::uint64_t size) { return folder.request(index, size); },
                                                       [&](auto&, int index) { return std::optional(folder.content(index)); }};
        for (auto const& law : varve::conformance::check_sink(fixture)) BOOST_ERROR(law);
    }
}

BOOST_AUTO_TEST_CASE(gpu_memory_goes_through_cufile_but_for_the_tail) {
    gpu_image image;
    sink s({.writer_threads = 3, .gpu = image.gpu});
    auto slot = s.register_memory(image.bytes.bytes());
    BOOST_TEST(slot == 0);
    {
        auto target = s.open(image.folder.request(0, image.bytes.size()));
        BOOST_TEST(!write_gpu(target, 0, image.bytes.bytes(), slot));
        BOOST_TEST(!target.sync());
    }
    BOOST_TEST(holds(image.folder, image.bytes));
    if (is_direct(s)) {
        BOOST_TEST(image.gpu->transfers == 3u);
        BOOST_TEST(image.gpu->copied_bytes == 77u);
        BOOST_TEST(image.gpu->opened == 1u);
    }
    BOOST_TEST(image.gpu->base_is_known.load());
    BOOST_TEST(image.gpu->opened == image.gpu->closed);
    BOOST_TEST(s.describe().find("fake cuFile, 3 threads, ") == 0u, s.describe());
    BOOST_TEST(s.describe().find("registered memory") != std::string::npos, s.describe());
}

BOOST_AUTO_TEST_CASE(gpu_memory_is_read_back_the_same_way) {
    gpu_image image;
    sink s({.gpu = image.gpu});
    auto target = s.open(image.folder.request(0, image.bytes.size()));
    BOOST_TEST(!write_gpu(target, 0, image.bytes.bytes()));
    varve::detail::aligned_bytes out(image.bytes.size());
    std::binary_semaphore came{0};
    target.read(0, out.bytes(), varve::memory_kind::device, varve::unregistered,
                {[](void* context, std::error_code ec) noexcept {
                     if (!ec) static_cast<std::binary_semaphore*>(context)->release();
                 },
                 &came});
    BOOST_TEST(came.try_acquire_for(std::chrono::seconds(30)));
    BOOST_TEST(std::equal(out.bytes().begin(), out.bytes().end(), image.bytes.bytes().begin()));
}

BOOST_AUTO_TEST_CASE(short_and_interrupted_transfers_are_resumed) {
    gpu_image image;
    image.gpu->on_transfer = [](std::size_t call, std::size_t size) -> std::int64_t {
        if (call % 3 == 1) return call % 2 ? -EINTR : -EAGAIN;
        return static_cast<std::int64_t>(std::min<std::size_t>(size, 256u << 10));
    };
    sink s({.gpu = image.gpu});
    auto target = s.open(image.folder.request(0, image.bytes.size()));
    BOOST_TEST(!write_gpu(target, 0, image.bytes.bytes()));
    BOOST_TEST(holds(image.folder, image.bytes));
}

BOOST_AUTO_TEST_CASE(a_failed_transfer_says_why_in_the_right_category) {
    for (auto [answer, expected] :
         {std::pair{-ENOSPC, std::error_code(ENOSPC, std::system_category())}, {0, std::error_code(EIO, std::system_category())}}) {
        gpu_image image;
        image.gpu->on_transfer = [answer = answer](std::size_t, std::size_t) -> std::int64_t { return answer; };
        sink s({.gpu = image.gpu});
        auto target = s.open(image.folder.request(0, image.bytes.size()));
        if (!is_direct(s)) return skip("no O_DIRECT here");
        BOOST_TEST(write_gpu(target, 0, image.bytes.bytes()) == expected);
    }
    gpu_image image;
    image.gpu->copy_failure = varve::gds::detail::first_of_cuda + cudaErrorIllegalAddress;
    sink s({.direct = false, .gpu = image.gpu});
    auto target = s.open(image.folder.request(0, image.bytes.size()));
    BOOST_TEST(write_gpu(target, 0, image.bytes.bytes()) == std::error_code(cudaErrorIllegalAddress, varve::cuda::category()));
    BOOST_TEST((varve::gds::code_of(not_supported).category() == varve::gds::category()));
    BOOST_TEST(varve::gds::code_of(not_supported).message() == "cuFile: GPUDirect Storage not supported on current file");
    BOOST_TEST(!varve::gds::code_of(0));
}

BOOST_AUTO_TEST_CASE(what_cufile_refuses_goes_through_host_memory_and_is_told) {
    for (bool at_open : {true, false}) {
        gpu_image image;
        if (at_open)
            image.gpu->open_failure = not_supported;
        else
            image.gpu->on_transfer = [](std::size_t, std::size_t) -> std::int64_t { return -not_supported; };
        sink s({.gpu = image.gpu});
        auto target = s.open(image.folder.request(0, image.bytes.size()));
        BOOST_TEST(!write_gpu(target, 0, image.bytes.bytes()));
        BOOST_TEST(holds(image.folder, image.bytes));
        BOOST_TEST(image.gpu->copied_bytes == image.bytes.size());
        if (!is_direct(s)) continue;
        BOOST_TEST(s.describe().find("through host memory since cuFile refuses (cuFile: GPUDirect Storage not supported on current file)") !=
                       std::string::npos,
                   s.describe());
    }
}

BOOST_AUTO_TEST_CASE(memory_that_cannot_be_registered_is_written_all_the_same_and_told) {
    gpu_image image;
    image.gpu->memory_failure = 5036;  // CU_FILE_GPU_MEMORY_PINNING_FAILED
    sink s({.gpu = image.gpu});
    BOOST_TEST(s.register_memory(image.bytes.bytes()) == varve::unregistered);
    auto target = s.open(image.folder.request(0, image.bytes.size()));
    BOOST_TEST(!write_gpu(target, 0, image.bytes.bytes()));
    BOOST_TEST(holds(image.folder, image.bytes));
    BOOST_TEST(s.describe().find("9 MiB unregistered (cuFile: failed to allocate pinned GPU Memory)") != std::string::npos, s.describe());
    image.gpu->device_memory = false;
    sink other({.gpu = image.gpu});
    BOOST_TEST(other.register_memory(image.bytes.bytes()) == varve::unregistered);
    BOOST_TEST(other.describe().find("no registered memory") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(registered_memory_is_given_back_with_the_sink) {
    auto gpu = std::make_shared<fake_cufile>();
    auto bytes = some_bytes(1u << 20);
    {
        sink first({.gpu = gpu});
        first.register_memory(bytes.bytes());
        sink s(std::move(first));
        BOOST_TEST(gpu->removed == 0u);
    }
    BOOST_TEST((gpu->added == 1u && gpu->removed == 1u));
}

BOOST_AUTO_TEST_CASE(a_failed_sync_fails_for_ever) {
    gpu_image image;
    failing_calls calls;
    calls.on_sync = [](int n) { return n == 0 ? EIO : 0; };
    sink s({.gpu = image.gpu, .calls = &calls});
    auto target = s.open(image.folder.request(0, image.bytes.size()));
    BOOST_TEST(!write_gpu(target, 0, image.bytes.bytes()));
    BOOST_TEST(is(target.sync(), EIO));
    BOOST_TEST(is(target.sync(), EIO));
}

BOOST_AUTO_TEST_CASE(a_save_from_device_memory_through_a_pool_of_two_blocks_is_whole_and_comes_back) {
    temporary_folder dir;
    toy_model model(5, varve::block_unit_bytes / 4 + 19);
    auto gpu = std::make_shared<fake_cufile>();
    auto run = [&](auto scheduling, std::uint64_t first_step) {
        varve::checkpointer<device_staging, decltype(scheduling), sink> ck(
            model.state(), device_staging(2 * varve::block_unit_bytes, varve::block_unit_bytes), scheduling, sink({.gpu = gpu}), dir.path());
        for (auto step = first_step; step < first_step + 4; ++step) {
            ck.begin(step);
            for (std::size_t l = 0; l < 5; ++l) {
                ck.before_update(l);
                model.update(l, step);
                ck.layer_ready(l);
            }
            ck.seal();
        }
        ck.drain();
        model.update(99);
        varve::restore_options thorough;
        thorough.verify_first = true;
        BOOST_TEST(ck.restore({}, thorough)->step == first_step + 3);
        BOOST_TEST(model.is_of(first_step + 3));
    };
    run(varve::layerwise<2>{}, 1);
    run(varve::async<2>{}, 5);
    BOOST_TEST(gpu->base_is_known.load());
    BOOST_TEST((gpu->opened == gpu->closed && gpu->added == gpu->removed && gpu->added == 2u));
}

BOOST_AUTO_TEST_CASE(the_way_is_named) {
    using varve::gds::detail::path_text;
    BOOST_TEST(path_text({}) == "compatibility mode (nvidia-fs is not loaded)");
    BOOST_TEST(path_text({.pci_p2p = true}) == "compatibility mode (nvidia-fs is not loaded; PCI P2PDMA where kernel and disk have it)");
    BOOST_TEST(path_text({.nvidia_fs = "2.25.7", .device_node = true}) == "nvidia-fs 2.25.7");
    BOOST_TEST(path_text({.nvidia_fs = "2.25.7"}) == "compatibility mode (nvidia-fs 2.25.7 is loaded, but /dev/nvidia-fs0 is not here)");
    BOOST_TEST(path_text({.nvidia_fs = "2.25.7", .device_node = true, .forced_compat = true}) ==
               "compatibility mode (CUFILE_FORCE_COMPAT_MODE is set)");
}

BOOST_AUTO_TEST_CASE(where_cufile_does_not_start_available_says_why) {
    auto why = sink::available();
    if (!why) return skip("cuFile starts here");
    BOOST_TEST(!why.message().empty());
    BOOST_CHECK_EXCEPTION(sink(), varve::error, [&](auto const& e) { return e.code() == why; });
}

BOOST_AUTO_TEST_SUITE_END()
