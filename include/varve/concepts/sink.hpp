#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "varve/state.hpp"

namespace varve {

/// The one answer to a write: a function and its context. It allocates nothing and may be called on any thread, even
/// inside the call to write. The function must be noexcept.
struct completion {
    void (*done)(void* context, std::error_code error) noexcept = nullptr;
    void* context = nullptr;

    void operator()(std::error_code error) const noexcept { done(context, error); }
};

inline constexpr int unregistered = -1;

/// Bytes on their way to storage. They stay valid and unchanged until the write's completion.
struct block {
    std::byte const* data = nullptr;
    std::size_t size_bytes = 0;
    memory_kind memory = memory_kind::host;
    int slot = unregistered;  ///< what register_memory returned for the region that holds the bytes
};

/// What a sink asks of blocks, in bytes, each a power of two; and what suits it best.
struct sink_limits {
    std::size_t memory_alignment = 1;
    std::size_t offset_alignment = 1;
    std::size_t length_alignment = 1;  ///< of every block but the one that ends the image
    std::size_t best_block_bytes = 4u << 20;
    std::size_t queue_depth = 1;  ///< writes that it carries out at once
};

/// What a sink is to open. Sinks that are no files ignore `folder` and `name`.
struct open_request {
    int folder = -1;               ///< descriptor of the folder that holds the file
    std::string name;              ///< the file's name in it; created if it is not there
    std::uint64_t size_bytes = 0;  ///< of the whole image; 0 where the format cannot know
    std::uint64_t step = 0;        ///< that the checkpoint is of
    completion lost{};             ///< for relaying sinks
};

namespace detail::sink_has {

template <class T>
concept noexcept_write = requires(T& t, std::uint64_t offset, block const& b, completion c) {
    { t.write(offset, b, c) } noexcept -> std::same_as<void>;
};
template <class T>
concept noexcept_sync = requires(T& t) {
    { t.sync() } noexcept -> std::same_as<std::error_code>;
};
template <class T>
concept move_only = std::movable<T> && !std::copyable<T>;
template <class S>
concept open = requires(S& s, open_request const& r) {
    { s.open(r) } -> std::same_as<typename S::target_type>;
};
template <class S>
concept limits = requires(S const& s) {
    { s.limits() } -> std::same_as<sink_limits>;
};
template <class S>
concept accepts = requires { typename std::bool_constant<S::accepts(memory_kind::host)>; };
template <class S>
concept describe = requires(S const& s) {
    { s.describe() } -> std::same_as<std::string>;
};
template <class S>
concept target_type = requires { typename S::target_type; };

}  // namespace detail::sink_has

/// T satisfies `target`, the open end of a sink, if:
///  1. it is move-only; destroying it closes it, and no write is in flight then;
///  2. `write(offset_bytes, block, completion)` is noexcept, returns at once or when done, and calls the completion
///     exactly once, when the bytes are written or the write has failed; it resumes short writes and EINTR itself;
///  3. writes may be issued from several threads, in any order, and do not overlap;
///  4. `sync()` is noexcept and returns when every completed write and the size are durable. Not called with a write in flight.
/// It need not keep writes in order, read back, or make anything durable before sync.
template <class T>
concept target = detail::sink_has::move_only<T> && detail::sink_has::noexcept_write<T> && detail::sink_has::noexcept_sync<T>;

/// S satisfies `sink`, what takes blocks to storage, if:
///  1. it is movable, and its targets may not outlive it;
///  2. `target_type` satisfies `target`, and `open(open_request)` yields one or throws varve::error;
///  3. `limits()` gives its alignments, best block size and queue depth, the same at every call;
///  4. `accepts(memory_kind)` is a static constexpr function;
///  5. `describe()` says in one line how it writes (direct or buffered, registered or not).
template <class S>
concept sink = std::movable<S> && detail::sink_has::target_type<S> && target<typename S::target_type> && detail::sink_has::open<S> &&
               detail::sink_has::limits<S> && detail::sink_has::accepts<S> && detail::sink_has::describe<S>;

/// A sink whose targets are files in a folder: it needs a store, which names, commits and keeps them.
template <class S>
concept file_sink = sink<S> && requires { requires S::writes_files; };

/// A sink that takes staging memory for itself once, before the first write: `register_memory(bytes)` returns the slot
/// that blocks of that region carry, or `unregistered` where the kernel refuses (describe() then says why).
template <class S>
concept registering_sink = sink<S> && requires(S& s, std::span<std::byte> region) {
    { s.register_memory(region) } -> std::same_as<int>;
};

/// A sink whose targets read back: `read(offset_bytes, bytes, completion)` under the same rules as write.
template <class S>
concept reading_sink = sink<S> && requires(typename S::target_type& t, std::uint64_t offset, std::span<std::byte> out, completion c) {
    { t.read(offset, out, c) } noexcept -> std::same_as<void>;
};

/// A sink that takes bytes in GPU memory.
template <class S>
concept device_sink = sink<S> && S::accepts(memory_kind::device);

/// Explains, one line a member, what S lacks to be a sink. Instantiate it where `sink<S>` fails.
template <class S>
consteval bool explain_sink() {
    static_assert(std::movable<S>, "varve: a sink must be movable");
    static_assert(detail::sink_has::target_type<S>, "varve: a sink must name its target_type");
    if constexpr (detail::sink_has::target_type<S>) {
        using T = typename S::target_type;
        static_assert(detail::sink_has::move_only<T>, "varve: a target must be move-only");
        static_assert(detail::sink_has::noexcept_write<T>,
                      "varve: a target must have void write(std::uint64_t offset_bytes, varve::block const&, varve::completion) noexcept");
        static_assert(detail::sink_has::noexcept_sync<T>, "varve: a target must have std::error_code sync() noexcept");
        static_assert(detail::sink_has::open<S>, "varve: a sink must have target_type open(varve::open_request const&)");
    }
    static_assert(detail::sink_has::limits<S>, "varve: a sink must have varve::sink_limits limits() const");
    static_assert(detail::sink_has::accepts<S>, "varve: a sink must have static constexpr bool accepts(varve::memory_kind)");
    static_assert(detail::sink_has::describe<S>, "varve: a sink must have std::string describe() const");
    return sink<S>;
}

}  // namespace varve
