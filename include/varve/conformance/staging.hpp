#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/image.hpp"

namespace varve::conformance {

/// How a staging's laws are looked at. `make(pool_bytes, block_bytes)` yields a staging; `fetch` copies a buffer's bytes
/// to the host once its copies are done; `place` puts a tensor's bytes where the staging's tensors lie (nothing: on the host).
template <staging S>
struct staging_fixture {
    std::function<S(std::size_t pool_bytes, std::size_t block_bytes)> make;
    std::function<void(typename S::buffer_type const&, std::span<std::byte>)> fetch = [](auto const& b, std::span<std::byte> out) {
        std::memcpy(out.data(), b.data(), out.size());
    };
    std::function<void*(std::span<std::byte>)> place = [](std::span<std::byte> bytes) { return bytes.data(); };
    typename S::order_type order{};
    /// What the tensors' memory is; where `place` puts them.
    memory_kind tensors = S::memory == memory_kind::device ? memory_kind::device : memory_kind::host;
};

/// The laws of concepts/staging.hpp that code can look at; answers with one line for each that is broken. Throws what
/// `make` throws.
template <staging S>
std::vector<std::string> check_staging(staging_fixture<S> const& f) {
    constexpr std::size_t block = block_unit_bytes;
    constexpr std::size_t count = 3;
    std::vector<std::string> broken;
    auto expect = [&](bool holds, char const* law) {
        if (!holds) broken.emplace_back(law);
    };
    S s = f.make(count * block, block);
    std::stop_source never;

    expect(s.block_bytes() == block && s.block_count() == count, "a pool of 3 blocks has 3 blocks of the size that was asked for");
    std::size_t region_bytes = 0;
    for (auto r : s.regions()) region_bytes += r.size();
    expect(region_bytes == count * block, "the regions are the pool, and no more");

    std::vector<typename S::buffer_type> held;
    for (std::size_t i = 0; i < count; ++i) held.push_back(s.acquire(never.get_token()));
    std::vector<std::byte*> addresses;
    for (auto const& b : held) {
        expect(static_cast<bool>(b), "a free buffer is not empty");
        expect(reinterpret_cast<std::uintptr_t>(b.data()) % 4096 == 0, "a buffer is aligned to 4,096 bytes");
        auto r = s.regions()[b.region()];
        expect(b.data() >= r.data() && b.data() + block <= r.data() + r.size(), "a buffer lies in the region that it names");
        addresses.push_back(b.data());
    }
    std::sort(addresses.begin(), addresses.end());
    for (std::size_t i = 1; i < count; ++i) expect(addresses[i] - addresses[i - 1] >= static_cast<std::ptrdiff_t>(block), "buffers do not overlap");

    std::stop_source stop;
    std::jthread stopper([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        stop.request_stop();
    });
    expect(!s.acquire(stop.get_token()), "acquire answers with an empty buffer when it is stopped, and the pool does not grow");
    stopper.join();
    std::jthread giver([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        held.pop_back();
    });
    auto again = s.acquire(never.get_token());
    giver.join();
    expect(static_cast<bool>(again), "a buffer that is given back wakes who waits for one");
    auto moved = std::move(again);
    expect(static_cast<bool>(moved) && !again, "a buffer that was moved from is empty");

    // Ranges of two tensors, one of them transposed, go where they should, and nothing else of the buffer is promised.
    std::vector<std::byte> bytes(6 * 4 * sizeof(float)), expected(bytes.size());
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + 1);
    void* at = f.place(bytes);
    tensor plain{"plain", dtype::F32, {6, 4}, at, {}, f.tensors};
    tensor turned = plain;
    turned.shape = {4, 6};
    turned.strides = {1, 4};
    auto token = s.copy(moved, std::array{copy_range{&plain, 8, 40, 100}}, s.record(f.order));
    expect(!token.wait() && !token.wait(), "a copy that worked says so, again and again");
    std::vector<std::byte> out(block);
    f.fetch(moved, out);
    expect(std::equal(out.begin() + 100, out.begin() + 140, bytes.begin() + 8), "a range of a contiguous tensor arrives where it should");
    token = s.copy(moved, std::array{copy_range{&turned, 0, 96, 0}}, s.record(f.order));
    expect(!s.order_after(token, f.order), "order_after works on a copy that worked");
    expect(!token.wait(), "a copy of a strided tensor works");
    f.fetch(moved, out);
    for (std::size_t row = 0; row < 4; ++row)
        for (std::size_t column = 0; column < 6; ++column)
            std::memcpy(expected.data() + (row * 6 + column) * sizeof(float), bytes.data() + (row + column * 4) * sizeof(float), sizeof(float));
    expect(std::equal(expected.begin(), expected.end(), out.begin()), "a strided tensor arrives in row-major order");

    {
        auto moved_staging = std::move(s);
    }
    expect(static_cast<bool>(moved), "a buffer outlives its staging");
    return broken;
}

}  // namespace varve::conformance
