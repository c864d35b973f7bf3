#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "varve/detail/gather.hpp"
#include "varve/detail/granules.hpp"
#include "varve/detail/safetensors_match.hpp"
#include "varve/device_memory.hpp"

namespace varve::detail {

/// Takes the data of a checkpoint into the tensors of a state.
class restore_consumer {
public:
    /// `tensors` are sorted by where they begin; they outlive this. `device` is the way to those in GPU memory.
    restore_consumer(std::vector<restored_tensor> const& tensors, device_memory* device) : tensors_(tensors), device_(device) {}

    /// Lends the memory that every byte goes through, where tensors lie in GPU memory.
    device_memory* lender() const noexcept { return device_; }

    bool wants(std::uint64_t begin, std::uint64_t end) const {
        auto it = first_behind(begin);
        return it != tensors_.end() && it->begin < end;
    }

    /// Straight into the tensor where a run of chunks lies in one; a buffer serves where tensors are short.
    destination at(std::uint64_t offset, std::size_t size) const {
        constexpr std::size_t worthwhile_bytes = 2 * digest_chunk_bytes;
        destination const through_a_buffer(nullptr, std::min(size, worthwhile_bytes));
        auto it = first_behind(offset);
        if (it == tensors_.end() || it->begin > offset || !is_contiguous(*it->target)) return through_a_buffer;
        auto left = it->end() - offset;
        auto run = left >= size ? size : static_cast<std::size_t>(left / digest_chunk_bytes * digest_chunk_bytes);
        bool shared = it + 1 != tensors_.end() && (it + 1)->begin < it->end();  // two names of the state for one in the file
        if (shared || run < through_a_buffer.second) return through_a_buffer;
        return {static_cast<std::byte*>(it->target->data) + (offset - it->begin), run};
    }

    void take(std::uint64_t at, std::span<std::byte const> bytes) const {
        auto const end = at + bytes.size();
        for (auto it = first_behind(at); it != tensors_.end() && it->begin < end; ++it) {
            auto from = std::max(at, it->begin);
            auto to = std::min(end, it->end());
            if (from < to) put(*it->target, from - it->begin, bytes.subspan(from - at, to - from), device_);
        }
    }

private:
    /// The first tensor that ends behind `at`; ends rise as begins do, since a file's ranges don't overlap.
    std::vector<restored_tensor>::const_iterator first_behind(std::uint64_t at) const {
        return std::partition_point(tensors_.begin(), tensors_.end(), [at](auto const& t) { return t.end() <= at; });
    }

    std::vector<restored_tensor> const& tensors_;
    device_memory* device_;
};

}  // namespace varve::detail
