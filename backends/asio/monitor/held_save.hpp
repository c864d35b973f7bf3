#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/image.hpp"
#include "varve/store.hpp"

#include "file_writer.hpp"

namespace varve::asio::server {

class held_store;
struct held_save;

/// Bytes of the image that the monitor holds: in a region of the trainer's pool, or in memory of its own.
struct held_block {
    held_save* save = nullptr;
    std::uint64_t offset_bytes = 0;
    std::size_t size_bytes = 0;
    std::byte* data = nullptr;  ///< null while it is in a GPU's memory alone
    std::uint32_t region = 0;
    std::uint64_t region_offset = 0;
    std::shared_ptr<varve::detail::aligned_bytes> own;  ///< of a block that came as payload
    bool written = false, hashed = false;
    unsigned users = 0;   ///< a write and a hash under way
    bool let_go = false;  ///< its memory is somebody else's again
};

/// Where a save stands. `crash_safe` is whole; `durable` is committed and kept for its bytes alone.
enum class save_phase { receiving, crash_safe, durable, over };

/// One save, from BEGIN until nothing of it is held. The store's mutex guards it, but for what its writer alone uses.
struct held_save {
    held_save(held_store& in, std::uint64_t number, std::uint64_t of_step, std::uint64_t chunks)
        : store(&in), id(number), step(of_step), covered(chunks), digests(chunks) {}

    held_store* const store;
    std::uint64_t const id;
    std::uint64_t const step;
    save_phase phase = save_phase::receiving;
    std::error_code error{};  ///< why it is not wanted any more
    std::string why{};
    bool memory_alone = false;      ///< the disk did not take it once its trainer had gone: it is kept for its bytes
    std::error_code not_taken{};    ///< and why
    bool ended_by_trainer = false;  ///< COMMIT or ABANDON came: nothing more of it will

    std::deque<held_block> blocks{};
    std::vector<bool> covered;  ///< chunks of the data that came
    std::uint64_t covered_chunks = 0;
    std::size_t arrived = 0;             ///< of the blocks, the first so many: those whose bytes are here
    std::size_t hashed = 0, let_go = 0;  ///< of the blocks
    std::vector<std::uint64_t> digests;
    bool committed = false;  ///< COMMIT came
    metadata_map metadata{};
    std::vector<std::uint64_t> expected{};  ///< the trainer's digests, of a save that came as payload

    // The writer's.
    std::optional<slot> file{};
    std::unique_ptr<file_writer::target> target{};
    std::size_t submitted = 0;  ///< blocks
    std::size_t written = 0;
    std::size_t in_flight = 0;
    std::uint64_t sequence = 0;
    std::shared_ptr<varve::detail::aligned_bytes> header{};  ///< once it is written

    bool whole() const noexcept { return covered_chunks == covered.size() && arrived == blocks.size(); }
    /// Nothing of it is held; its file may still be, where it is being written.
    bool forgettable() const noexcept { return phase == save_phase::over && let_go == blocks.size(); }
};

/// Memory for blocks that come as payload: what was let go is used again for the next of the same size, with its pages.
class block_memory {
public:
    /// `limit_bytes`: what may lie here unused beside it.
    std::shared_ptr<varve::detail::aligned_bytes> take(std::size_t size, std::uint64_t limit_bytes) {
        auto found = std::find_if(free_.begin(), free_.end(), [&](auto const& m) { return m->size() == size; });
        if (found == free_.end()) {
            trim(limit_bytes);
            return std::make_shared<varve::detail::aligned_bytes>(size);
        }
        auto out = std::move(*found);
        free_.erase(found);
        free_bytes_ -= size;
        return out;
    }
    /// `limit_bytes`: what may lie here unused.
    void put(std::shared_ptr<varve::detail::aligned_bytes> memory, std::uint64_t limit_bytes) {
        free_bytes_ += memory->size();
        free_.push_back(std::move(memory));
        trim(limit_bytes);
    }

private:
    void trim(std::uint64_t limit_bytes) {
        while (free_bytes_ > limit_bytes) {
            free_bytes_ -= free_.front()->size();
            free_.pop_front();
        }
    }

    std::deque<std::shared_ptr<varve::detail::aligned_bytes>> free_;
    std::uint64_t free_bytes_ = 0;
};

}  // namespace varve::asio::server
