#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stop_token>
#include <system_error>
#include <utility>

#include "varve/device_memory.hpp"
#include "varve/loan.hpp"
#include "varve/state.hpp"

namespace varve {

struct image;

/// A range of a tensor, in the bytes of its row-major form, and where in a staging buffer it goes.
struct copy_range {
    tensor const* source = nullptr;
    std::uint64_t source_offset_bytes = 0;
    std::size_t size_bytes = 0;
    std::size_t buffer_offset_bytes = 0;
};

namespace detail::staging_has {

template <class S>
concept types = requires {
    typename S::buffer_type;
    typename S::order_type;
    typename S::point_type;
    typename S::token_type;
};
template <class B>
concept buffer = std::movable<B> && !std::copyable<B> && std::default_initializable<B> && requires(B const& b) {
    { b.data() } -> std::same_as<std::byte*>;
    { b.region() } -> std::same_as<std::size_t>;
    static_cast<bool>(b);
};
template <class T>
concept snapshot = std::movable<T> && !std::copyable<T> && std::default_initializable<T> && requires(T const& t) { static_cast<bool>(t); };
template <class T>
concept token = std::copyable<T> && requires(T const& t) {
    { t.wait() } noexcept -> std::same_as<std::error_code>;
};
template <class S>
concept acquire = requires(S& s, std::stop_token stop) {
    { s.acquire(stop) } -> std::same_as<typename S::buffer_type>;
};
template <class S>
concept record = requires(S& s, typename S::order_type order) {
    { s.record(order) } noexcept -> std::same_as<typename S::point_type>;
};
template <class S>
concept copy = requires(S& s, typename S::buffer_type& b, std::span<copy_range const> ranges, typename S::point_type const& after) {
    { s.copy(b, ranges, after) } noexcept -> std::same_as<typename S::token_type>;
};
template <class S>
concept order_after = requires(S& s, typename S::token_type const& t, typename S::order_type order) {
    { s.order_after(t, order) } noexcept -> std::same_as<std::error_code>;
};
template <class S>
concept sizes = requires(S const& s) {
    { s.block_bytes() } -> std::same_as<std::size_t>;
    { s.block_count() } -> std::same_as<std::size_t>;
};
template <class S>
concept regions = requires(S& s) {
    { s.regions() } -> std::convertible_to<std::span<std::span<std::byte> const>>;
};
template <class S>
concept memory = requires { typename std::integral_constant<memory_kind, S::memory>; };

template <class S>
concept digest = requires(S& s, typename S::buffer_type const& b, std::size_t size, std::span<std::uint64_t> out) {
    { s.digest(b, size, out) } noexcept -> std::same_as<std::error_code>;
};

}  // namespace detail::staging_has

/// S satisfies `staging`, the pool where bytes wait once they have left the training tensors, if:
///  1. `memory` is a static constexpr memory_kind: what its buffers are made of;
///  2. `buffer_type` is move-only, with data() (aligned to 4,096 bytes), region() and a test for emptiness; destroying
///     a buffer gives it back, on any thread, and wakes one that waits for it;
///  3. `block_count()` buffers of `block_bytes()` bytes each exist from the start, in the `regions()`, and never more;
///  4. `acquire(stop)` waits for a free buffer and returns an empty one only when `stop` was requested;
///  5. `order_type` says what orders copies against the training: empty on a host, a stream on a GPU. `record(order)` is
///     noexcept and yields a copyable `point_type`: all work that is in `order` by now;
///  6. `copy(buffer, ranges, point)` is noexcept and gathers ranges into the buffer once the work before `point` is done;
///  7. it answers with a copyable `token_type`: wait() returns when the copy is done, with its error, on any thread, again
///     and again; a tensor in host memory has been read when copy returns. Tokens that compare equal, where they can be
///     compared, stand for the same copies;
///  8. `order_after(token, order)` makes later work in `order` wait for the copy, on a host by waiting itself.
/// It need not copy asynchronously. The training thread records and orders while one other thread acquires and copies.
template <class S>
concept staging =
    std::movable<S> && detail::staging_has::memory<S> && detail::staging_has::types<S> && detail::staging_has::buffer<typename S::buffer_type> &&
    detail::staging_has::token<typename S::token_type> && std::copyable<typename S::order_type> && std::copyable<typename S::point_type> &&
    detail::staging_has::acquire<S> && detail::staging_has::record<S> && detail::staging_has::copy<S> && detail::staging_has::order_after<S> &&
    detail::staging_has::sizes<S> && detail::staging_has::regions<S>;

namespace detail::staging_has {

template <class S>
concept snapshots = requires { typename S::snapshot_type; } && snapshot<typename S::snapshot_type> &&
                    requires(S& s, image const& img, state const& st, std::size_t count, typename S::snapshot_type& shot,
                             std::span<std::size_t const> layers, std::span<typename S::point_type const> after, typename S::buffer_type& b,
                             std::uint64_t offset, std::size_t size, std::size_t at, typename S::token_type const& taken) {
                        { s.prepare_snapshots(img, st, count) } -> std::same_as<std::size_t>;
                        { s.acquire_snapshot() } noexcept -> std::same_as<typename S::snapshot_type>;
                        { s.take(shot, layers, after) } noexcept -> std::same_as<typename S::token_type>;
                        { s.copy(b, at, shot, offset, size, taken) } noexcept -> std::same_as<typename S::token_type>;
                    };

template <class S>
concept snapshot_digest = requires(S& s, S const& c, typename S::snapshot_type const& shot, std::span<std::uint64_t> out) {
    { c.digests_snapshots() } noexcept -> std::same_as<bool>;
    { s.digest(shot, out) } noexcept -> std::same_as<std::error_code>;
};

}  // namespace detail::staging_has

/// S satisfies `snapshotting_staging`, a staging that can put a whole save aside where its tensors are, so that training
/// goes on however long the way to the sink takes, if it is a staging and:
///  1. `prepare_snapshots(image, state, count)` makes room once, before the first save, and returns for how many there
///     is: none is no error;
///  2. `snapshot_type` is move-only, with a test for emptiness; destroying one gives it back, on any thread, once the
///     tokens of all copies from it were waited for (not that of take: the next one taken there follows it);
///  3. `acquire_snapshot()` is noexcept and returns an empty one where none is free;
///  4. `take(snapshot, layers, points)` is noexcept and puts the layers' tensors aside once the work before the points is done;
///     its token counts as that of a copy: tensors in host memory have been read when it returns. Whatever was taken before is
///     there before it;
///  5. `copy(buffer, buffer_offset_bytes, snapshot, offset_bytes, size_bytes, taken)` is noexcept and copies that range of
///     the image's data, counted from its start, once `taken`, the token of the layers there, is ready; if that ends
///     with an error, so does the copy's token.
/// The training thread records, orders and acquires snapshots, a second one takes, and the copying thread copies and hashes, all
/// at the same time, also with one snapshot.
template <class S>
concept snapshotting_staging = staging<S> && detail::staging_has::snapshots<S>;

/// S satisfies `snapshot_digesting_staging`, a staging that hashes its snapshots where they lie, if it is a snapshotting_staging and:
///  1. `digests_snapshots()` is noexcept and says, from prepare_snapshots on, whether it can here; if not, what is copied is hashed;
///  2. `digest(snapshot, digests)` is noexcept and puts the XXH3-64 (seed 0) of each chunk of digest_chunk_bytes of the image's
///     data, the last of which may be shorter, into `digests`, which has room for just these;
///  3. it returns when they are there, or with the error that kept them away.
/// Called by the copying thread once the copies of the whole image were issued, and before all of them were waited for.
template <class S>
concept snapshot_digesting_staging = snapshotting_staging<S> && detail::staging_has::snapshot_digest<S>;

/// A staging that knows the way to tensors which the CPU cannot reach: `reach(order)` gives it, once the work in `order` is
/// done, for restores.
template <class S>
concept reaching_staging = staging<S> && requires(S& s, typename S::order_type order) {
    { s.reach(order) } -> std::convertible_to<std::unique_ptr<device_memory>>;
};

/// A staging whose buffers lend: `lend()` on a buffer that is not empty is noexcept and gives a loan of its bytes.
template <class S>
concept lending_staging = staging<S> && requires(typename S::buffer_type const& b) {
    { b.lend() } noexcept -> std::same_as<loan>;
};

/// S satisfies `digesting_staging`, a staging that hashes its buffers itself, as one whose buffers the CPU cannot read
/// has to, if it is a staging and:
///  1. `digest(buffer, size_bytes, digests)` is noexcept and puts the XXH3-64 (seed 0) of each chunk of digest_chunk_bytes
///     within the buffer's first size_bytes, the last of which may be shorter, into the front of `digests`;
///  2. it returns when they are there, or with the error that kept them away.
/// Called once the copies into the buffer are done, on several threads, and while the sink reads the same bytes.
template <class S>
concept digesting_staging = staging<S> && detail::staging_has::digest<S>;

/// A staging that knows how long updates stood, on the device, in the waits of order_after: `gpu_wait_ns()` is noexcept and
/// says how long so far, as far as is known without waiting. Called by the training thread.
template <class S>
concept wait_measuring_staging = staging<S> && requires(S const& s) {
    { s.gpu_wait_ns() } noexcept -> std::same_as<std::int64_t>;
};

/// Explains, one line a member, what S lacks to be a staging. Instantiate it where `staging<S>` fails.
template <class S>
consteval bool explain_staging() {
    static_assert(std::movable<S>, "varve: a staging must be movable");
    static_assert(detail::staging_has::memory<S>, "varve: a staging must have static constexpr varve::memory_kind memory");
    static_assert(detail::staging_has::types<S>, "varve: a staging must name buffer_type, order_type, point_type and token_type");
    if constexpr (detail::staging_has::types<S>) {
        static_assert(detail::staging_has::buffer<typename S::buffer_type>,
                      "varve: a buffer must be move-only, with std::byte* data() const, std::size_t region() const and operator bool");
        static_assert(detail::staging_has::token<typename S::token_type>,
                      "varve: a token must be copyable, with std::error_code wait() const noexcept");
        static_assert(std::copyable<typename S::order_type> && std::copyable<typename S::point_type>,
                      "varve: an order_type and a point_type must be copyable");
        static_assert(detail::staging_has::record<S>, "varve: a staging must have point_type record(order_type) noexcept");
        static_assert(detail::staging_has::acquire<S>, "varve: a staging must have buffer_type acquire(std::stop_token)");
        static_assert(detail::staging_has::copy<S>,
                      "varve: a staging must have token_type copy(buffer_type&, std::span<varve::copy_range const>, point_type const&) noexcept");
        static_assert(detail::staging_has::order_after<S>,
                      "varve: a staging must have std::error_code order_after(token_type const&, order_type) noexcept");
    }
    static_assert(detail::staging_has::sizes<S>, "varve: a staging must have std::size_t block_bytes() const and block_count() const");
    static_assert(detail::staging_has::regions<S>, "varve: a staging must have regions(), a span of std::span<std::byte>");
    return staging<S>;
}

}  // namespace varve
