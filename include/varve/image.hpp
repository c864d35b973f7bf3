#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/state.hpp"

namespace varve {

/// A tensor's place in the image.
struct placed_tensor {
    std::size_t layer = 0;   ///< index in state::layers
    std::size_t tensor = 0;  ///< index in layer::tensors
    std::uint64_t offset_bytes = 0;
    std::uint64_t size_bytes = 0;
};

/// The checkpoint as bytes: a header's room, then the tensors without a gap, in the order of `tensors`.
struct image {
    std::uint64_t header_bytes = 0;  ///< offset of the data; a multiple of digest_chunk_bytes
    std::uint64_t size_bytes = 0;
    std::vector<placed_tensor> tensors;

    std::uint64_t data_bytes() const noexcept { return size_bytes - header_bytes; }
};

/// The data is hashed in chunks of this size, counted from its start. Source: varve/format/README.md, "Digests".
inline constexpr std::size_t digest_chunk_bytes = 64u << 10;
/// Blocks begin and end at multiples of this in the image.
inline constexpr std::size_t block_unit_bytes = 4u << 20;

/// A part of a block that comes from one tensor.
struct block_part {
    std::size_t layer = 0;
    copy_range range;
};

/// A fixed range of the image, on its way through one staging buffer to the sink.
struct block_plan {
    std::uint64_t offset_bytes = 0;
    std::size_t size_bytes = 0;
    std::size_t first_part = 0;
    std::size_t part_count = 0;
};

/// The image's data cut into blocks, and each block into the parts that layers fill. Made once, before the first save.
class block_map {
public:
    /// `block_bytes` is a multiple of block_unit_bytes. `s` must not move afterwards: the parts point into it.
    block_map(image const& img, state const& s, std::size_t block_bytes) : last_part_of_layer_(s.layers.size(), npos) {
        std::uint64_t at = img.header_bytes;
        auto end_of_block = [&](std::uint64_t offset) { return std::min((offset / block_bytes + 1) * block_bytes, img.size_bytes); };
        for (auto const& placed : img.tensors) {
            auto const& source = s.layers[placed.layer].tensors[placed.tensor];
            for (std::uint64_t done = 0; done < placed.size_bytes;) {
                if (blocks_.empty() || at == blocks_.back().offset_bytes + blocks_.back().size_bytes)
                    blocks_.push_back({at, static_cast<std::size_t>(end_of_block(at) - at), parts_.size(), 0});
                auto& b = blocks_.back();
                auto n = std::min<std::uint64_t>(placed.size_bytes - done, b.offset_bytes + b.size_bytes - at);
                last_part_of_layer_[placed.layer] = parts_.size();
                parts_.push_back({placed.layer, {&source, done, static_cast<std::size_t>(n), static_cast<std::size_t>(at - b.offset_bytes)}});
                ++b.part_count;
                done += n;
                at += n;
            }
        }
    }

    std::span<block_plan const> blocks() const noexcept { return blocks_; }
    std::span<block_part const> parts(block_plan const& b) const noexcept { return std::span(parts_).subspan(b.first_part, b.part_count); }

    static constexpr std::size_t npos = static_cast<std::size_t>(-1);
    /// Index, over all blocks, of the part after which nothing reads the layer any more; npos for a layer without bytes.
    std::size_t last_part_of(std::size_t layer) const noexcept { return last_part_of_layer_[layer]; }

private:
    std::vector<block_plan> blocks_;
    std::vector<block_part> parts_;
    std::vector<std::size_t> last_part_of_layer_;
};

}  // namespace varve
