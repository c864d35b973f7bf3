#include <boost/test/unit_test.hpp>

#include <sys/mman.h>
#include <memory>

#include "varve/conformance/staging.hpp"
#include "varve/staging/host.hpp"

BOOST_AUTO_TEST_SUITE(staging_conformance)

BOOST_AUTO_TEST_CASE(the_host_staging_keeps_the_laws) {
    varve::conformance::staging_fixture<varve::host_staging> fixture{
        [](std::size_t pool_bytes, std::size_t block_bytes) { return varve::host_staging(pool_bytes, block_bytes); }};
    for (auto const& law : varve::conformance::check_staging(fixture)) BOOST_ERROR(law);
}

BOOST_AUTO_TEST_CASE(the_host_staging_keeps_the_laws_in_memory_of_the_callers) {
    std::shared_ptr<void> shared;
    varve::conformance::staging_fixture<varve::host_staging> fixture{[&](std::size_t pool_bytes, std::size_t block_bytes) {
        shared = {::mmap(nullptr, pool_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), [=](void* p) { ::munmap(p, pool_bytes); }};
        return varve::host_staging(std::span(static_cast<std::byte*>(shared.get()), pool_bytes), block_bytes);
    }};
    for (auto const& law : varve::conformance::check_staging(fixture)) BOOST_ERROR(law);
}

BOOST_AUTO_TEST_CASE(memory_that_is_too_small_or_not_aligned_is_refused) {
    alignas(4096) static std::byte few[8192];
    BOOST_CHECK_THROW(varve::host_staging(std::span(few), varve::block_unit_bytes), varve::error);
    BOOST_CHECK_THROW(varve::host_staging(std::span(few).subspan(1, 4096), 4096), varve::error);
}

BOOST_AUTO_TEST_CASE(regions_are_no_larger_than_a_gibibyte) {
    // Mapped by the test and never touched, so that it costs no memory.
    std::size_t bytes = (std::size_t{2} << 30) + varve::block_unit_bytes;
    auto* memory = static_cast<std::byte*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    {
        varve::host_staging s(std::span(memory, bytes), varve::block_unit_bytes);
        BOOST_TEST(s.regions().size() == 3u);
        for (auto r : s.regions()) BOOST_TEST(r.size() <= std::size_t{1} << 30);
    }
    ::munmap(memory, bytes);
}

BOOST_AUTO_TEST_SUITE_END()
