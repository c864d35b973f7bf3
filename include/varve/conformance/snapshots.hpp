#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/conformance/staging.hpp"
#include "varve/detail/digest.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"

namespace varve::conformance {

/// The laws of snapshotting_staging and snapshot_digesting_staging that code can look at, for a fixture whose staging has
/// room for two snapshots; answers with one line for each that is broken. Throws what `make` throws.
template <snapshotting_staging S>
std::vector<std::string> check_snapshots(staging_fixture<S> const& f) {
    constexpr std::size_t block = block_unit_bytes, at = 4096;
    std::vector<std::string> broken;
    auto expect = [&](bool holds, char const* law) {
        if (!holds) broken.emplace_back(law);
    };

    std::vector<std::byte> wide(digest_chunk_bytes + 4101), square(6 * 4 * sizeof(float)), scalar(8);
    for (auto* bytes : {&wide, &square, &scalar})
        for (std::size_t i = 0; i < bytes->size(); ++i) (*bytes)[i] = static_cast<std::byte>(i * 7 + bytes->size());
    state st;
    st.layers.push_back({"first", {{"first.wide", dtype::U8, {static_cast<std::int64_t>(wide.size())}, f.place(wide), {}, f.tensors}}});
    st.layers.push_back({"second",
                         {{"second.turned", dtype::F32, {4, 6}, f.place(square), {1, 4}, f.tensors},
                          {"second.scalar", dtype::U8, {static_cast<std::int64_t>(scalar.size())}, scalar.data(), {}, memory_kind::host}}});
    auto const img = safetensors{}.lay_out(st);
    auto image_now = [&] {
        std::vector<std::byte> out(img.data_bytes());
        for (auto const& placed : img.tensors) {
            auto* to = out.data() + placed.offset_bytes - img.header_bytes;
            if (placed.layer == 0)
                std::copy(wide.begin(), wide.end(), to);
            else if (placed.tensor == 1)
                std::copy(scalar.begin(), scalar.end(), to);
            else
                for (std::size_t row = 0; row < 4; ++row)
                    for (std::size_t column = 0; column < 6; ++column)
                        std::memcpy(to + (row * 6 + column) * sizeof(float), square.data() + (row + column * 4) * sizeof(float), sizeof(float));
        }
        return out;
    };

    S s = f.make(2 * block, block);
    auto const room = s.prepare_snapshots(img, st, 2);
    expect(room == 2, "there is room for the two snapshots that the laws are looked at with");
    if (room < 2) return broken;

    std::vector<typename S::snapshot_type> held;
    for (std::size_t i = 0; i < room; ++i) held.push_back(s.acquire_snapshot());
    expect(std::all_of(held.begin(), held.end(), [](auto const& one) { return static_cast<bool>(one); }), "a free snapshot is not empty");
    expect(!s.acquire_snapshot(), "acquire_snapshot answers with an empty one where none is free");
    held.clear();

    std::stop_source never;
    auto buffer = s.acquire(never.get_token());
    std::vector<std::byte> out(block);
    typename S::snapshot_type kept;  // so that the next is had of memory that holds nothing yet
    for (int round = 0; round < 3; ++round) {
        auto shot = s.acquire_snapshot();
        expect(static_cast<bool>(shot), "a snapshot that was let go can be had again");
        auto moved = std::move(shot);
        expect(static_cast<bool>(moved) && !shot, "a snapshot that was moved from is empty");

        auto const then = image_now();
        auto const point = s.record(f.order);
        auto const first = s.take(moved, std::array<std::size_t, 1>{0}, std::array{point});
        auto const second = s.take(moved, std::array<std::size_t, 1>{1}, std::array{point});
        for (auto& b : scalar) b = static_cast<std::byte>(round + 1);
        auto const copied = s.copy(buffer, at, moved, 0, then.size(), second);
        expect(!copied.wait() && !copied.wait(), "a copy from a snapshot that worked says so, again and again");
        f.fetch(buffer, out);
        expect(std::equal(then.begin(), then.end(), out.begin() + at),
               "a snapshot holds the image's data: whatever was taken before the token, and host tensors as they were when take returned");
        expect(!s.order_after(first, f.order) && !s.order_after(second, f.order), "order_after works on what was taken");
        expect(!s.copy(buffer, 0, moved, 128, 1000, second).wait(), "a range of a snapshot can be copied");
        f.fetch(buffer, out);
        expect(std::equal(then.begin() + 128, then.begin() + 1128, out.begin()), "a range of a snapshot arrives where it should");
        if constexpr (snapshot_digesting_staging<S>) {
            if (s.digests_snapshots()) {
                std::vector<std::uint64_t> digests(varve::detail::chunk_count(then.size())), expected(digests.size());
                varve::detail::chunk_digests(then, expected);
                expect(!s.digest(moved, digests), "a snapshot can be hashed where digests_snapshots says so");
                expect(digests == expected, "the digests of a snapshot are those of the image's chunks, the last of which may be shorter");
            }
        }
        if (round == 0) kept = std::move(moved);
    }
    return broken;
}

}  // namespace varve::conformance
