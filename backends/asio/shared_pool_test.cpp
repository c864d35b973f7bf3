#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <sys/wait.h>
#include <cstring>

#include "varve/asio/shared_pool.hpp"
#include "varve/image.hpp"
#include "varve/staging/host.hpp"

namespace {

constexpr std::size_t block = varve::block_unit_bytes;

}  // namespace

BOOST_AUTO_TEST_SUITE(shared_pool)

BOOST_AUTO_TEST_CASE(another_process_sees_what_is_staged_and_cannot_change_its_size) {
    auto pool = std::make_shared<varve::asio::shared_pool>(3 * block + 17, block);
    BOOST_REQUIRE(pool->memory().size() == 3 * block);
    BOOST_REQUIRE(pool->regions().size() == 1u);
    auto const& region = pool->regions().front();
    BOOST_TEST((region.memory.data() == pool->memory().data()));
    auto* last = pool->memory().data() + 3 * block - 4;
    auto const child = ::fork();
    if (child == 0) {
        void* seen = ::mmap(nullptr, 3 * block, PROT_READ | PROT_WRITE, MAP_SHARED, region.descriptor.get(), 0);
        std::memcpy(static_cast<std::byte*>(seen) + 3 * block - 4, "seen", 4);
        ::_exit(::ftruncate(region.descriptor.get(), 0) == -1 && ::ftruncate(region.descriptor.get(), 4 * block) == -1 ? 0 : 1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    BOOST_TEST(status == 0);
    BOOST_TEST(std::memcmp(last, "seen", 4) == 0);
}

BOOST_AUTO_TEST_CASE(a_staging_keeps_the_pool_and_so_do_its_loans) {
    std::weak_ptr<varve::asio::shared_pool> watched;
    varve::loan kept;
    {
        auto pool = std::make_shared<varve::asio::shared_pool>(2 * block, block);
        watched = pool;
        varve::host_staging staging(pool->memory(), block, pool);
        BOOST_TEST(staging.block_count() == 2u);
        pool.reset();
        auto buffer = staging.acquire({});
        kept = buffer.lend();
    }
    BOOST_TEST(!watched.expired());
    kept.reset();
    BOOST_TEST(watched.expired());
}

BOOST_AUTO_TEST_CASE(more_memory_than_there_is_is_refused_in_one_line) {
    BOOST_CHECK_EXCEPTION(varve::asio::shared_pool(std::size_t{1} << 46, block), varve::error,
                          [](varve::error const& e) { return std::string(e.what()).find("give a smaller pool") != std::string::npos; });
}

BOOST_AUTO_TEST_SUITE_END()
