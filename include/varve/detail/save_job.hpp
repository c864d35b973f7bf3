#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <system_error>
#include <vector>

#include "varve/concepts/staging.hpp"
#include "varve/image.hpp"
#include "varve/slot.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"
#include "varve/ticket.hpp"

namespace varve::detail {

/// A save's place in the line of those that write; `handed` over is one that a relaying sink has whole.
enum class turn { waiting, opening, writing, handed };

/// Stands where a staging takes no snapshots.
struct no_snapshot {
    explicit operator bool() const noexcept { return false; }
};
template <class Staging>
struct snapshot_of {
    using type = no_snapshot;
};
template <snapshotting_staging Staging>
struct snapshot_of<Staging> {
    using type = typename Staging::snapshot_type;
};

template <class Staging, class Sink>
struct save_line;

/// One save on its way. But for what says otherwise, the line's mutex guards it.
template <class Staging, class Sink>
struct save_job {
    using buffer_type = typename Staging::buffer_type;
    using token_type = typename Staging::token_type;
    using point_type = typename Staging::point_type;
    using target_type = typename Sink::target_type;

    /// A block of the image while it has a buffer. Its address is the context of its write.
    struct block_in_flight {
        save_job* job = nullptr;
        std::size_t index = 0;
        buffer_type buffer;
        std::vector<token_type> copies;
        int open_ends = 0;  ///< of its write and its hashing, those not done
    };

    save_job(std::size_t layer_count, std::size_t block_count) : points(layer_count), taken(layer_count), blocks(block_count) {
        untaken.reserve(layer_count);
        to_take.reserve(layer_count);
        held.reserve(block_count);
    }

    /// Makes it the save of that step, with room for a snapshot or without.
    void start(std::uint64_t step, typename snapshot_of<Staging>::type aside) {
        ticket = std::make_shared<ticket_state>(step);
        snapshot = std::move(aside);
        by_snapshot = static_cast<bool>(snapshot);
    }

    std::uint64_t step() const noexcept { return ticket->step(); }

    save_line<Staging, Sink>* line = nullptr;  ///< for the sink's callbacks
    std::shared_ptr<ticket_state> ticket;
    metadata_map metadata;

    std::vector<std::optional<point_type>> points;  ///< a layer's, once it is announced
    bool sealed = false;

    /// Where the layers are put aside first, if there was room for it at begin. Emptied once all blocks are staged.
    typename snapshot_of<Staging>::type snapshot{};
    bool by_snapshot = false;
    bool hashed_aside = false;                     ///< the digests are made of the snapshot, not of the blocks
    std::vector<std::optional<token_type>> taken;  ///< a layer's, once it is in the snapshot
    std::vector<std::size_t> untaken;              ///< announced, to be taken with those to come; the training thread's
    std::uint64_t untaken_bytes = 0;
    bool passed_on = false;            ///< some of the layers
    std::vector<std::size_t> to_take;  ///< passed on to the taker, which has not begun with them
    bool taking = false;               ///< the taker is at it, without the mutex

    std::size_t next_block = 0;  ///< the copying thread's place
    std::size_t next_part = 0;   ///< within that block
    bool filling = false;        ///< that block has a buffer
    bool copied = false;         ///< nothing reads the tensors for this save any more
    std::size_t blocks_staged = 0;

    std::vector<block_in_flight> blocks;
    std::vector<std::size_t> held;  ///< staged blocks that wait for the turn
    std::size_t open_blocks = 0;    ///< between the tensors and the sink

    std::vector<std::uint64_t> chunk_digests;  ///< made with the first block; each written once, with its block or the snapshot

    turn place = turn::waiting;
    std::optional<slot> file;           ///< of file sinks
    std::optional<target_type> target;  ///< set before place becomes writing, used without the mutex from then on
    std::error_code error;              ///< the first one; the save is lost with it
    bool committing = false;            ///< too late to abandon it

    std::optional<std::error_code> safe_came, end_came;  ///< what a relaying sink answers
    bool safe_told = false;                              ///< the first was told to whoever waits
    bool safe = false;                                   ///< and was good

    bool has_news() const noexcept { return end_came || (safe_came && !safe_told); }

    bool over() const noexcept { return copied && open_blocks == 0 && to_take.empty() && !taking && place != turn::opening && (sealed || error); }
};

}  // namespace varve::detail
