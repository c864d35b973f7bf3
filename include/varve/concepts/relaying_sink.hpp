#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "varve/checkpointer_options.hpp"
#include "varve/concepts/format.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/image.hpp"
#include "varve/loan.hpp"
#include "varve/state.hpp"
#include "varve/system.hpp"

namespace varve {

/// What a relaying sink is told of the run, once. The references are good during the call only.
struct relayed_run {
    state const& tensors;  ///< their names, dtypes and shapes; the bytes come as blocks
    image const& layout;
    std::string_view extension;  ///< the format's, with the dot
    std::size_t block_bytes = 0;
    std::size_t in_flight = 1;  ///< saves that may be on their way at once
    when_busy busy = when_busy::block;
    memory_kind memory = memory_kind::host;  ///< what the blocks are in
};

/// A checkpoint that a sink has brought back.
struct fetched_checkpoint {
    file_descriptor file;  ///< the whole file, to be read by pread from offset 0
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    std::string name;  ///< where it stands, for people
};

namespace detail::sink_has {

template <class T>
concept lent_write = requires(T& t, std::uint64_t offset, block const& b, completion c, loan l) {
    { t.write(offset, b, c, std::move(l)) } noexcept -> std::same_as<void>;
};
template <class T>
concept hand_over =
    requires(T& t, commit_values const& values, std::span<std::uint64_t const> chunk_digests, completion crash_safe, completion durable) {
        { t.hand_over(values, chunk_digests, crash_safe, durable) } noexcept -> std::same_as<void>;
    };
template <class S>
concept introduce = requires(S& s, relayed_run const& run) { s.introduce(run); };
template <class S>
concept takes_digests = requires(S const& s) {
    { s.takes_digests() } noexcept -> std::same_as<bool>;
};
template <class S>
concept set_draining = requires(S& s, bool on) {
    { s.set_draining(on) } noexcept -> std::same_as<void>;
};
template <class S>
concept fetch = requires(S& s, std::optional<std::uint64_t> step, std::uint32_t skip) {
    { s.fetch(step, skip) } -> std::same_as<std::optional<fetched_checkpoint>>;
};

}  // namespace detail::sink_has

/// S satisfies `relaying_sink`, one that hands checkpoints to somebody who commits them and may outlive the trainer, if it
/// is a sink without files and:
///  1. `introduce(relayed_run)` is called once, after all memory was registered and before the first open; it throws
///     varve::error where no checkpoint of this run will be taken;
///  2. `takes_digests()` is noexcept and says, from then on, whether it wants the trainer to hash;
///  3. its target's `write(offset_bytes, block, completion, loan)` is as write without a loan, but the block's bytes stay
///     valid and unchanged for as long as the sink keeps the loan, even after the completion. A sink that takes no digests
///     may refuse a block that is not lent, or not in memory that it registered, with errc::unsupported;
///  4. its target's `hand_over(commit values, chunk digests, crash_safe, durable)` is noexcept, called once after every byte
///     but the header's was written, and returns at once. What it was given is copied. The sequence is the receiver's to choose;
///  5. both completions are called exactly once, crash_safe first, on any thread, even inside hand_over: crash_safe when
///     the receiver has the whole checkpoint and the trainer may die, durable when it is committed. An error of the first
///     is one of the second too; errc::replaced, after a crash_safe without error, is a save that gave way to a newer one;
///  6. destroying a target before means that the save is not wanted, or no longer waited for: once the destructor has
///     returned, none of its completions is called. It may be destroyed on any thread but inside its completions;
///  7. what its open was given as `lost`, where it is not empty, is called at most once, with an error and on any thread, even inside
///     open, when it is known before hand_over that the save will not be taken, also while nothing of it is being written: a receiver
///     that is gone may keep every block on loan. Not after an open that threw. A hand_over that comes all the same is answered with
///     the error.
/// The sync() of its targets is not called. It need not keep any order among saves.
template <class S>
concept relaying_sink = sink<S> && !file_sink<S> && detail::sink_has::introduce<S> && detail::sink_has::takes_digests<S> &&
                        detail::sink_has::lent_write<typename S::target_type> && detail::sink_has::hand_over<typename S::target_type>;

/// S satisfies `pacing_sink`, one whose receiver may let a save wait before it makes it durable, if it is a relaying sink and
/// `set_draining(on)` is noexcept and says that somebody waits for the saves, so that none is to be held back, or that nobody does any
/// longer. Called after introduce, by turns with true and false, on the thread that waits: the training thread.
template <class S>
concept pacing_sink = relaying_sink<S> && detail::sink_has::set_draining<S>;

/// S satisfies `fetching_sink` if it is a sink and `fetch(step, skip)` brings back the newest checkpoint, or that of `step`,
/// `skip` newer ones left out; nothing where there is none. It throws varve::error where it cannot tell.
template <class S>
concept fetching_sink = sink<S> && detail::sink_has::fetch<S>;

/// Explains, one line a member, what S lacks to be a relaying sink. Instantiate it where `relaying_sink<S>` fails.
template <class S>
consteval bool explain_relaying_sink() {
    static_assert(explain_sink<S>());
    static_assert(!file_sink<S>, "varve: a relaying sink writes no files of its own");
    static_assert(detail::sink_has::introduce<S>, "varve: a relaying sink must have introduce(varve::relayed_run const&)");
    static_assert(detail::sink_has::takes_digests<S>, "varve: a relaying sink must have bool takes_digests() const noexcept");
    static_assert(detail::sink_has::lent_write<typename S::target_type>,
                  "varve: a relaying sink's target must have void write(std::uint64_t offset_bytes, varve::block const&, varve::completion, "
                  "varve::loan) noexcept");
    static_assert(
        detail::sink_has::hand_over<typename S::target_type>,
        "varve: a relaying sink's target must have void hand_over(varve::commit_values const&, std::span<std::uint64_t const> chunk_digests, "
        "varve::completion crash_safe, varve::completion durable) noexcept");
    return relaying_sink<S>;
}

}  // namespace varve
