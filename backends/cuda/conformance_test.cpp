#include <boost/test/unit_test.hpp>

#include "device_model.hpp"
#include "varve/conformance/snapshots.hpp"
#include "varve/conformance/staging.hpp"

namespace {

using varve::cuda::pinned_staging;
using namespace varve_test;

varve::conformance::staging_fixture<pinned_staging> fixture(pinned_staging::order_type order) {
    return {.make = [](std::size_t pool_bytes, std::size_t block_bytes) { return pinned_staging(pool_bytes, block_bytes, {.snapshots = 2}); },
            .order = order};
}

void expect_lawful(varve::conformance::staging_fixture<pinned_staging> const& f) {
    for (auto const& law : varve::conformance::check_staging(f)) BOOST_ERROR(law);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_conformance)

BOOST_AUTO_TEST_CASE(pinned_staging_keeps_the_laws_for_tensors_in_host_memory) {
    if (have_gpu()) expect_lawful(fixture({}));
}

BOOST_AUTO_TEST_CASE(pinned_staging_keeps_the_laws_for_tensors_in_gpu_memory) {
    if (!have_gpu()) return;
    user_stream own;
    for (auto stream : {cudaStream_t(nullptr), cudaStreamPerThread, own.stream}) {
        std::vector<std::unique_ptr<device_bytes>> placed;
        auto f = fixture({stream});
        f.tensors = varve::memory_kind::device;
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

BOOST_AUTO_TEST_SUITE_END()
