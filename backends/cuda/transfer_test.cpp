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
            std::vector<std::byte> bytes(size);
            for (auto& b : bytes) b = static_cast<std::byte>((all.size() + static_cast<std::size_t>(&b - bytes.data())) * 2654435761u >> 13);
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

std::vector<std::byte> read_all(varve::cuda::transfer& way, numbered_tensors const& from) {
    std::vector<std::byte> out;
    auto const reader = way.read(from.list());
    for (auto bytes = reader->next(); !bytes.empty(); bytes = reader->next()) out.insert(out.end(), bytes.begin(), bytes.end());
    BOOST_TEST(reader->next().empty());
    return out;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_transfer)

BOOST_AUTO_TEST_CASE(tensors_of_all_sizes_are_read_in_order) {
    if (!have_gpu()) return;
    constexpr std::size_t most = 4u << 20;
    numbered_tensors const from({0, 3, most, 1, 3 * most + 5, 0, 0, most - 1, 77, 5 * most, 0});
    varve::cuda::transfer own_pieces(nullptr);
    BOOST_TEST((read_all(own_pieces, from) == from.all));
    // No more than one piece at a time.
    varve::cuda::page_locked memory(varve::device_memory::piece_bytes);
    std::array stretches{memory.bytes()};
    varve::cuda::transfer one_piece(nullptr, stretches);
    BOOST_TEST((read_all(one_piece, from) == from.all));
    BOOST_TEST((read_all(one_piece, from) == from.all));
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
        BOOST_TEST((read_all(way, from) == from.all));
    }
}

BOOST_AUTO_TEST_CASE(a_strided_tensor_is_read_in_row_major_order) {
    if (!have_gpu()) return;
    constexpr std::int64_t rows = 700, columns = 5001;
    std::vector<std::int16_t> values(rows * columns), expected;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::int16_t>(i * 31);
    for (std::int64_t c = 0; c < columns; ++c)
        for (std::int64_t r = 0; r < rows; ++r) expected.push_back(values[static_cast<std::size_t>(r * columns + c)]);
    device_bytes memory(values.size() * 2);
    expect(::cudaMemcpy(memory.data, values.data(), memory.size, cudaMemcpyDefault));
    settle();
    varve::tensor const turned{"turned", varve::dtype::I16, {columns, rows}, memory.data, {1, columns}, varve::memory_kind::device};
    varve::cuda::transfer way(nullptr);
    std::vector<std::byte> out;
    auto const reader = way.read({&turned});
    for (auto bytes = reader->next(); !bytes.empty(); bytes = reader->next()) out.insert(out.end(), bytes.begin(), bytes.end());
    BOOST_TEST_REQUIRE(out.size() == expected.size() * 2);
    BOOST_TEST(std::memcmp(out.data(), expected.data(), out.size()) == 0);
}

BOOST_AUTO_TEST_CASE(a_read_follows_what_is_in_the_stream_then) {
    if (!have_gpu()) return;
    user_stream training;
    numbered_tensors const from({100});
    varve::cuda::transfer way(training.stream);
    gate door;
    door.close();
    door.hold(training.stream);
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
