#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <system_error>
#include <vector>

#include "varve/device_memory.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"

namespace varve {

/// What a commit adds to the tensors.
struct commit_values {
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    metadata_map metadata;  ///< the user's; names that begin with `varve.` are refused
};

/// What a checkpoint file says of itself.
struct checkpoint_identity {
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    metadata_map metadata;
};

struct restore_options {
    unsigned workers = 1;             ///< threads that read and hash
    bool check_digests = true;        ///< off: files of other people, which have none
    bool verify_first = false;        ///< read everything once before a tensor changes
    bool model_only = false;          ///< leave every tensor alone whose name does not begin with `model.`
    device_memory* device = nullptr;  ///< the way to tensors in GPU memory; errc::unsupported for those where there is none
};

/// What the store and the tools ask of a file format; every function reads `fd` from offset 0 by pread, bounds what a
/// hostile file can make it allocate, and throws error with errc::malformed, not_whole or mismatch and one line.
class file_format {
public:
    virtual ~file_format() = default;

    /// With the dot, as in ".safetensors".
    virtual std::string_view extension() const noexcept = 0;
    /// Header and structure. errc::not_whole where the keys of a whole checkpoint are missing.
    virtual checkpoint_identity identify(int fd) const = 0;
    /// Every byte against the digests.
    virtual void verify(int fd, unsigned workers) const = 0;
    /// Names, shapes and dtypes against the state's; errc::mismatch names the first difference.
    virtual void expect_same_layout(int fd, state const& s) const = 0;
    /// Reads the tensors' bytes into the state. Structure and layout are checked before the first byte changes; on a
    /// later error the tensors are undefined. Does not call state::restored. Returns what identify does; nothing where
    /// no digests are checked, since the file may be other people's.
    virtual checkpoint_identity restore(int fd, state& s, restore_options const& options) const = 0;
};

/// Where a streaming format writes to, in order. write throws varve::error.
class byte_stream {
public:
    virtual ~byte_stream() = default;
    virtual void write(std::span<std::byte const> bytes) = 0;
};

namespace detail::format_has {

template <class F>
concept lay_out = requires(F const& f, state const& s) {
    { f.lay_out(s) } -> std::same_as<image>;
};
template <class F>
concept expect_fits = requires(F const& f, metadata_map const& m) { f.expect_fits(m); };
template <class F>
concept header = requires(F const& f, state const& s, image const& i, commit_values const& v, std::span<std::uint64_t const> chunk_digests) {
    { f.header(s, i, v, chunk_digests) } -> std::same_as<std::vector<std::byte>>;
};
template <class F>
concept stream = requires(F const& f, state const& s, commit_values const& v, byte_stream& out) {
    { f.stream(s, v, out) } -> std::same_as<void>;
};

}  // namespace detail::format_has

/// F satisfies `fixed_layout_format`, whose image is known before the first byte is written, if it is a file_format and:
///  1. `lay_out(state)` gives the same image for the same names, shapes and dtypes;
///  2. `expect_fits(metadata)` throws errc::metadata_too_large for metadata that the header has no room for;
///  3. `header(state, image, values, chunk_digests)` gives exactly image.header_bytes bytes, or throws as expect_fits
///     does; chunk_digests has one XXH3-64 for each digest_chunk_bytes of data.
template <class F>
concept fixed_layout_format =
    std::derived_from<F, file_format> && detail::format_has::lay_out<F> && detail::format_has::expect_fits<F> && detail::format_has::header<F>;

/// F satisfies `streaming_format` if it is a file_format and `stream(state, values, out)` writes the whole file, in order.
template <class F>
concept streaming_format = std::derived_from<F, file_format> && detail::format_has::stream<F>;

/// F satisfies `format` if it is one of the two.
template <class F>
concept format = std::movable<F> && (fixed_layout_format<F> || streaming_format<F>);

/// Explains, one line a member, what F lacks to be a format. Instantiate it where `format<F>` fails.
template <class F>
consteval bool explain_format() {
    static_assert(std::derived_from<F, file_format>, "varve: a format must derive from varve::file_format");
    static_assert(
        detail::format_has::stream<F> || detail::format_has::lay_out<F>,
        "varve: a format must have image lay_out(state const&) const, or void stream(state const&, commit_values const&, byte_stream&) const");
    static_assert(detail::format_has::stream<F> || detail::format_has::expect_fits<F>,
                  "varve: a fixed layout must have void expect_fits(metadata_map const&) const");
    static_assert(detail::format_has::stream<F> || detail::format_has::header<F>,
                  "varve: a fixed layout must have std::vector<std::byte> header(state const&, image const&, commit_values const&, "
                  "std::span<std::uint64_t const>) const");
    return format<F>;
}

}  // namespace varve
