#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "varve/state.hpp"

namespace varve::detail {

/// The innermost dimensions that lie in memory without a gap form one run.
struct tensor_run {
    std::size_t outer = 0;  ///< dimensions outside of the run; 0 if the tensor is contiguous
    std::uint64_t elements = 1;
};

inline tensor_run dense_run(tensor const& t) noexcept {
    if (t.strides.empty()) return {0, t.element_count()};
    tensor_run run{t.shape.size(), 1};
    for (; run.outer > 0; --run.outer) {
        auto extent = t.shape[run.outer - 1];
        if (extent != 1 && t.strides[run.outer - 1] != static_cast<std::int64_t>(run.elements)) break;
        run.elements *= static_cast<std::uint64_t>(extent);
    }
    return run;
}

/// Calls visit(address, offset_in_range, size) for each run of bytes that lie side by side in memory, in row-major
/// order, of bytes [offset, offset + size) of the tensor's row-major form.
template <class Visit>
void for_each_run(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, Visit visit) {
    if (size_bytes == 0) return;
    auto* base = static_cast<std::byte*>(t.data);
    auto const [outer, run_elements] = dense_run(t);
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

/// Whether the tensor's row-major form is what lies in memory.
inline bool is_contiguous(tensor const& t) { return dense_run(t).outer == 0; }

/// Copies bytes [offset, offset + size) of the tensor's row-major form to `to`. The tensor lies in host memory.
inline void gather(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte* to) {
    for_each_run(t, offset_bytes, size_bytes, [to](std::byte const* address, std::size_t at, std::size_t n) { std::memcpy(to + at, address, n); });
}

/// Copies `from` to bytes [offset, offset + size) of the tensor's row-major form. The tensor lies in host memory.
inline void scatter(tensor const& t, std::uint64_t offset_bytes, std::size_t size_bytes, std::byte const* from) {
    for_each_run(t, offset_bytes, size_bytes, [from](std::byte* address, std::size_t at, std::size_t n) { std::memcpy(address, from + at, n); });
}

}  // namespace varve::detail
