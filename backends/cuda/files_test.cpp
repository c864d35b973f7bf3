#include <boost/test/unit_test.hpp>

#include "device_model.hpp"
#include "files.hpp"
#include "varve/posix/sink.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/uring/sink.hpp"

namespace {

using namespace varve_test;
using varve::cuda::pinned_staging;
constexpr std::size_t block = varve::block_unit_bytes;

/// What is saved from the GPU stands in the file, digests and all.
template <class Sink>
void saves_to_files(Sink sink) {
    temporary_folder dir;
    device_model model(4, 3 * block + 77);
    user_stream own;
    varve::checkpointer<pinned_staging, varve::async<2>, Sink> ck(model.state(), pinned_staging(4 * block, block, {.snapshots = 2}), {},
                                                                  std::move(sink), dir.path());
    for (std::uint64_t step = 1; step <= 5; ++step) {
        ck.before_update_all({own.stream});
        for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, step, own.stream);
        ck.save(step, {}, {own.stream});
    }
    ck.drain();
    BOOST_TEST_MESSAGE(ck.describe_sink());
    auto saved = ck.files().checkpoints();
    BOOST_REQUIRE(saved.size() == 2u);
    for (auto const& c : saved) {
        auto path = dir.path() / c.name;
        varve::file_descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC), varve::system_calls::kernel());
        BOOST_CHECK_NO_THROW(varve::safetensors{}.verify(fd.get(), 2));
        auto img = varve::safetensors{}.lay_out(model.state());
        std::vector<std::byte> bytes(img.data_bytes());
        BOOST_REQUIRE(::pread(fd.get(), bytes.data(), bytes.size(), static_cast<off_t>(img.header_bytes)) == static_cast<ssize_t>(bytes.size()));
        BOOST_TEST(std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
        BOOST_TEST(std::to_integer<std::uint64_t>(bytes[0]) == c.step);
    }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_files)

BOOST_AUTO_TEST_CASE(page_locked_blocks_go_to_files_through_posix) {
    if (have_gpu()) saves_to_files(varve::posix::sink());
}

BOOST_AUTO_TEST_CASE(page_locked_blocks_go_to_files_through_io_uring) {
    if (!have_gpu()) return;
    if (auto why = varve::uring::sink::available()) return skip("no io_uring here: " + why.message());
    saves_to_files(varve::uring::sink());
}

BOOST_AUTO_TEST_SUITE_END()
