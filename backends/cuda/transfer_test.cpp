#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <array>
#include <future>

#include "device_model.hpp"
#include "varve/cuda/transfer.hpp"

namespace {

using namespace varve_test;
using namespace std::chrono_literals;

/// Tensors of these sizes, whose bytes say where they are.
struct numbered_tensors {
    explicit numbered_tensors(std::vector<std::size_t> const& sizes) {
        for (auto size : sizes) {
            memory.push_back(std::make_unique<device_bytes>(std::max<std::size_t>(size, 1)));
            auto const bytes = numbered_bytes(size, all.size());
            expect(::cudaMemcpy(memory.back()->data, bytes.data(), size, cudaMemcpyDefault));
            all.insert(all.end(), bytes.begin(), bytes.end());
            auto name = "t" + std::to_string(tensors.size());
            tensors.push_back({name, varve::dtype::U8, {static_cast<std::int64_t>(size)}, memory.back()->data, {}, varve::memory_kind::device});
        }
        settle();
    }
    std::vector<varve::tensor const*> list() const {
        std::vector<varve::tensor const*> out;
        for (auto const& t : tensors) out.push_back(&t);
        return out;
    }

    std::vector<std::unique_ptr<device_bytes>> memory;
    std::vector<varve::tensor> tensors;
    std::vector<std::byte> all;  ///< one after the other
};

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_transfer)

BOOST_AUTO_TEST_CASE(tensors_of_all_sizes_are_read_in_order) {
    if (!have_gpu()) return;
    constexpr std::size_t most = 4u << 20;
    numbered_tensors const from({0, 3, most, 1, 3 * most + 5, 0, 0, most - 1, 77, 5 * most, 0});
    varve::cuda::transfer own_pieces(nullptr);
    BOOST_TEST((read_all(own_pieces, from.list()) == from.all));
    // No more than one piece at a time.
    varve::cuda::page_locked memory(varve::device_memory::piece_bytes);
    std::array stretches{memory.bytes()};
    varve::cuda::transfer one_piece(nullptr, stretches);
    BOOST_TEST((read_all(one_piece, from.list()) == from.all));
    BOOST_TEST((read_all(one_piece, from.list()) == from.all));
}

BOOST_AUTO_TEST_CASE(a_reader_that_is_let_go_in_the_middle_gives_its_pieces_back) {
    if (!have_gpu()) return;
    numbered_tensors const from({std::size_t{20} << 20, 5});
    // With a piece less the last reader waits for ever.
    for (std::size_t count : {1, 3}) {
        varve::cuda::page_locked memory(count * varve::device_memory::piece_bytes);
        std::array stretches{memory.bytes()};
        varve::cuda::transfer way(nullptr, stretches);
        for (int pieces = 0; pieces < 5; ++pieces) {
            auto const reader = way.read(from.list());
            for (int i = 0; i < pieces; ++i) BOOST_TEST(!reader->next().empty());
        }
        BOOST_TEST((read_all(way, from.list()) == from.all));
    }
}

BOOST_AUTO_TEST_CASE(a_strided_tensor_is_read_in_row_major_order) {
    if (!have_gpu()) return;
    turned_matrix const turned(700, 5001);
    varve::cuda::transfer way(nullptr);
    BOOST_TEST((read_all(way, {&turned.tensor}) == turned.expected));
}

BOOST_AUTO_TEST_CASE(a_read_follows_what_is_in_the_stream_then) {
    if (!have_gpu()) return;
    user_stream training;
    numbered_tensors const from({100});
    varve::cuda::transfer way(training.stream);
    gate door;
    door.close();
    hold(training.stream, door);
    expect(::cudaMemsetAsync(from.memory[0]->data, 9, 100, training.stream));
    auto const reader = way.read(from.list());
    auto read = std::async(std::launch::async, [&] { return reader->next(); });
    BOOST_TEST((read.wait_for(50ms) == std::future_status::timeout));
    door.open();
    auto const bytes = read.get();
    BOOST_TEST(bytes.size() == 100u);
    BOOST_TEST(std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{9}; }));
}

BOOST_AUTO_TEST_SUITE_END()
