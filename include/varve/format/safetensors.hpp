#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/granules.hpp"
#include "varve/detail/restore_consumer.hpp"
#include "varve/detail/safetensors_match.hpp"
#include "varve/detail/safetensors_outline.hpp"
#include "varve/detail/safetensors_write.hpp"

namespace varve {

/// Checkpoints as safetensors files, with digests over every byte in the metadata; `safetensors.torch.load_file` opens
/// each as it is. Source: varve/format/README.md, "safetensors". Thread-safe: it holds no state but its limit.
///
///     varve::safetensors format;
///     varve::image img = format.lay_out(state);
///     // ... the tensors' bytes to img.tensors[i].offset_bytes, and then at 0:
///     std::vector<std::byte> header = format.header(state, img, {step, sequence, metadata}, chunk_digests);
class safetensors final : public file_format {
public:
    /// What the user's metadata may take in the header by default, in bytes.
    static constexpr std::uint64_t default_metadata_bytes = 4096;

    explicit safetensors(std::uint64_t metadata_bytes = default_metadata_bytes) noexcept : metadata_bytes_(metadata_bytes) {}

    std::string_view extension() const noexcept override { return ".safetensors"; }

    /// The checkpoint's layout: the same for the same names, shapes, dtypes and aliases, whatever the step.
    /// Throws std::errc::invalid_argument for what no safetensors file can hold (names twice or not UTF-8).
    image lay_out(state const& s) const { return detail::lay_out_safetensors(s, metadata_bytes_); }

    /// Throws errc::metadata_too_large where `metadata`, escaped and quoted as JSON, takes more than its room, and
    /// std::errc::invalid_argument for keys that begin with `varve.` and for what is not UTF-8.
    void expect_fits(metadata_map const& metadata) const {
        auto size = detail::user_metadata_text(metadata).size();
        if (size > metadata_bytes_)
            throw error(errc::metadata_too_large,
                        "the metadata takes " + std::to_string(size) + " bytes in the header, which has room for " + std::to_string(metadata_bytes_));
    }

    /// The header of an image whose data has these digests, one for each digest_chunk_bytes: exactly image.header_bytes bytes.
    /// Throws as expect_fits does.
    std::vector<std::byte> header(state const& s, image const& img, commit_values const& values, std::span<std::uint64_t const> chunk_digests) const {
        expect_fits(values.metadata);
        return detail::safetensors_header(s, img, values, chunk_digests);
    }

    checkpoint_identity identify(int fd) const override {
        auto outline = detail::read_outline(fd);
        detail::expect_whole_header(fd, outline);
        auto identity = counts_of(outline);
        struct {
            metadata_map& pairs;
            void tensor(detail::header_entry const&) noexcept {}
            void metadata(std::string const& key, std::string const& value, std::uint64_t) { detail::keep_users(pairs, key, value); }
        } users{identity.metadata};
        detail::visit_header(fd, outline.extent, users);
        return identity;
    }

    void verify(int fd, unsigned workers) const override { detail::verify_whole(fd, detail::read_outline(fd), workers); }

    void expect_same_layout(int fd, state const& s) const override { detail::match_state(fd, detail::read_outline(fd), s, false); }

    checkpoint_identity restore(int fd, state& s, restore_options const& options) const override {
        auto outline = detail::read_outline(fd);
        checkpoint_identity identity;
        if (options.check_digests) {
            detail::expect_whole_header(fd, outline);
            identity = counts_of(outline);
        }
        auto const tensors = detail::match_state(fd, outline, s, options.model_only, options.check_digests ? &identity.metadata : nullptr);
        for (auto const& t : tensors) detail::expect_reachable(*t.target, options.device, "cannot restore ");
        if (options.verify_first) detail::verify_whole(fd, outline, options.workers);
        detail::sweep_granules(fd, outline, options.workers, options.check_digests, detail::restore_consumer(tensors, options.device));
        if (options.device) options.device->finish();
        return identity;
    }

private:
    static checkpoint_identity counts_of(detail::safetensors_outline const& outline) {
        return {detail::parse_count(outline.step, detail::step_key), detail::parse_count(outline.sequence, detail::sequence_key), {}};
    }

    std::uint64_t metadata_bytes_;
};

static_assert(fixed_layout_format<safetensors>);
static_assert(format<safetensors>);

}  // namespace varve
