#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "varve/state.hpp"

namespace varve::detail {

/// Calls visit(address, offset_in_range, size) for each run of bytes that lie side by side in memory, in row-major
/// order, of bytes [offset, offset + size) of the tensor's row-major form.
template <class Visit>
void for_each_run(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, Visit visit) {
    if (size_bytes == 0) return;
    auto* base = static_cast<std::byte*>(t.data);
    // The innermost dimensions that are dense form one run.
    std::size_t outer = t.strides.empty() ? 0 : t.shape.size();
    std::uint64_t run_elements = t.strides.empty() ? t.element_count() : 1;
    while (outer > 0) {
        auto d = outer - 1;
        if (t.shape[d] != 1 && t.strides[d] != static_cast<std::int64_t>(run_elements)) break;
        run_elements *= static_cast<std::uint64_t>(t.shape[d]);
        --outer;
    }
    if (outer == 0) {
        visit(base + offset_bytes, std::size_t{0}, size_bytes);
        return;
    }
    auto element = element_bytes(t.type);
    auto run_bytes = run_elements * element;
    auto within = offset_bytes % run_bytes;
    auto run = offset_bytes / run_bytes;
    for (std::size_t done = 0; done < size_bytes; ++run, within = 0) {
        std::int64_t elements_from_base = 0;
        auto rest = run;
        for (auto d = outer; d-- > 0;) {
            auto extent = static_cast<std::uint64_t>(t.shape[d]);
            elements_from_base += static_cast<std::int64_t>(rest % extent) * t.strides[d];
            rest /= extent;
        }
        auto n = std::min<std::size_t>(size_bytes - done, run_bytes - within);
        visit(base + elements_from_base * static_cast<std::int64_t>(element) + within, done, n);
        done += n;
    }
}

/// Copies bytes [offset, offset + size) of the tensor's row-major form to `to`. The tensor lies in host memory.
inline void gather(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte* to) {
    for_each_run(t, offset_bytes, size_bytes, [to](std::byte const* address, std::size_t at, std::size_t n) { std::memcpy(to + at, address, n); });
}

/// Copies `from` to bytes [offset, offset + size) of the tensor's row-major form. The tensor lies in host memory.
inline void scatter(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte const* from) {
    for_each_run(t, offset_bytes, size_bytes, [from](std::byte* address, std::size_t at, std::size_t n) { std::memcpy(address, from + at, n); });
}

}  // namespace varve::detail
