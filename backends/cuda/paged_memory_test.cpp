#include <boost/test/unit_test.hpp>

#include <array>
#include <cstring>
#include <fstream>

#include "device_model.hpp"
#include "varve/cuda/detail/paged_memory.hpp"
#include "varve/scheduling/async.hpp"

namespace {

using namespace varve_test;
constexpr std::size_t block = varve::block_unit_bytes;

/// The node that the page at `data` lies on, by the kernel's word.
int node_of(void* data) {
    int node = -1;
    if (::syscall(SYS_get_mempolicy, &node, nullptr, 0UL, data, static_cast<unsigned long>(MPOL_F_NODE | MPOL_F_ADDR)) != 0) return -1;
    return node;
}

/// A node that has memory; -1, and the running test is skipped, where nothing can be bound.
int some_node() {
    std::ifstream file("/sys/devices/system/node/has_memory");
    int node = 0;
    file >> node;
    try {
        varve::cuda::detail::paged_memory memory(4096, node);
        memory.data()[0] = std::byte{1};
        return node;
    } catch (varve::error const& e) {
        skip(std::string("no memory can be bound to a NUMA node here: ") + e.what());
        return -1;
    }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_paged_memory)

BOOST_AUTO_TEST_CASE(memory_of_a_node_lies_there) {
    int const node = some_node();
    if (node < 0) return;
    varve::cuda::detail::paged_memory memory(3 * block, node);
    std::memset(memory.data(), 1, 3 * block);
    BOOST_TEST(node_of(memory.data()) == node);
    BOOST_TEST(node_of(memory.data() + 3 * block - 1) == node);
    auto moved = std::move(memory);
    BOOST_TEST((memory.data() == nullptr && moved.data()[3 * block - 1] == std::byte{1}));
}

BOOST_AUTO_TEST_CASE(memory_of_any_node_begins_where_a_page_does_and_if_large_where_a_huge_one_does) {
    using varve::cuda::detail::paged_memory;
    for (std::size_t size : {std::size_t{1}, std::size_t{4097}, paged_memory::huge_bytes, 2 * paged_memory::huge_bytes + 8192}) {
        paged_memory memory(size);
        std::memset(memory.data(), 1, size);
        BOOST_TEST(reinterpret_cast<std::uintptr_t>(memory.data()) % (size < paged_memory::huge_bytes ? 4096 : paged_memory::huge_bytes) == 0u);
        paged_memory moved(std::move(memory));
        memory = std::move(moved);
        BOOST_TEST((moved.data() == nullptr && memory.data()[size - 1] == std::byte{1}));
    }
    BOOST_CHECK_EXCEPTION(paged_memory(std::size_t{1} << 62), varve::error, [](auto const& e) { return e.code() == std::errc::not_enough_memory; });
}

BOOST_AUTO_TEST_CASE(page_locked_memory_of_any_size_is_what_a_gpu_copies_to) {
    if (!have_gpu()) return;
    for (std::size_t size : {std::size_t{4}, std::size_t{2u << 20}, std::size_t{(5u << 20) + 12}}) {
        auto memory = varve::cuda::page_locked::in_huge_pages(size);
        BOOST_TEST(memory.bytes().size() == size);
        cudaPointerAttributes about{};
        expect(::cudaPointerGetAttributes(&about, memory.data() + size - 1));
        BOOST_TEST((about.type == cudaMemoryTypeHost));
        BOOST_TEST((about.devicePointer == memory.data() + size - 1));
        auto const moved = std::move(memory);
        std::memset(moved.data(), 3, size);
    }
}

BOOST_AUTO_TEST_CASE(a_node_that_is_not_there_is_named) {
    if (some_node() < 0) return;
    for (int node : {-5, 1023, 1024, 100'000})
        BOOST_CHECK_EXCEPTION(varve::cuda::detail::paged_memory(block, node), varve::error, [&](auto const& e) {
            return e.code() == std::errc::invalid_argument && std::string(e.what()).find("NUMA node " + std::to_string(node)) != std::string::npos;
        });
}

BOOST_AUTO_TEST_CASE(a_pool_that_is_bound_to_a_node_lies_there_and_takes_saves) {
    if (!have_gpu()) return;
    int const node = some_node();
    if (node < 0) return;
    user_stream own;
    device_model model;
    auto log = std::make_shared<checking_sink::log>();
    varve::cuda::pinned_staging staging(3 * block, block, {.snapshots = 1, .numa_node = node});
    for (auto region : staging.regions()) {
        BOOST_TEST(node_of(region.data()) == node);
        cudaPointerAttributes about{};
        expect(::cudaPointerGetAttributes(&about, region.data()));
        BOOST_TEST((about.type == cudaMemoryTypeHost));
    }
    varve::checkpointer<varve::cuda::pinned_staging, varve::async<2>, checking_sink> ck(model.state(), std::move(staging), {},
                                                                                        checking_sink(model.state(), log));
    for (std::uint64_t step = 1; step <= 3; ++step) {
        ck.before_update_all({own.stream});
        for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, step, own.stream);
        ck.save(step, {}, {own.stream});
    }
    ck.drain();
    BOOST_TEST(log->steps == (std::vector<int>{1, 2, 3}), boost::test_tools::per_element());
    BOOST_CHECK_THROW(varve::cuda::pinned_staging(block, block, {.numa_node = 1023}), varve::error);
    int const nearest = varve::cuda::numa_node_of(0);
    BOOST_TEST(nearest >= -1);
    BOOST_TEST(::cudaPeekAtLastError() == cudaSuccess);
}

BOOST_AUTO_TEST_SUITE_END()
