#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/gather.hpp"
#include "varve/torch/detail/archive_index.hpp"
#include "varve/torch/detail/crc32.hpp"
#include "varve/torch/detail/zip_reader.hpp"

namespace varve::libtorch {

/// Reads the archives that varve::libtorch::archive writes: what they say of themselves, every byte against the digest, and the
/// tensors back into a state. Needs no LibTorch. Thread-safe.
///
/// The last record, `varve/digest`, is the XXH3-64 of all bytes before its local header; everything behind that is rebuilt from
/// the records and compared, so that one flipped bit anywhere is found.
class archive_reader : public file_format {
public:
    std::string_view extension() const noexcept override { return ".pt"; }

    checkpoint_identity identify(int fd) const override {
        detail::zip_directory directory(fd);
        expected_digest(fd, directory);
        return identity_of(fd, directory);
    }

    /// One digest runs over all bytes: `workers` makes no difference.
    void verify(int fd, unsigned) const override {
        detail::zip_directory directory(fd);
        auto const expected = expected_digest(fd, directory);
        sweep(fd, directory.records().back().offset, expected, [](std::uint64_t, std::span<std::byte const>) {});
    }

    void expect_same_layout(int fd, state const& s) const override { detail::match_archive(fd, detail::zip_directory(fd), s, false); }

    checkpoint_identity restore(int fd, state& s, restore_options const& options) const override {
        detail::zip_directory directory(fd);
        auto const expected = options.check_digests ? expected_digest(fd, directory) : 0;
        auto const match = detail::match_archive(fd, directory, s, options.model_only);
        auto identity = options.check_digests ? identity_of(fd, directory) : checkpoint_identity{};
        for (auto const& l : s.layers)
            for (auto const& t : l.tensors) varve::detail::expect_reachable(t, options.device, "cannot restore ");
        if (options.verify_first) verify(fd, options.workers);
        auto const& tensors = match.from_records;
        if (options.check_digests) {
            auto next = tensors.begin();
            sweep(fd, directory.records().back().offset, expected, [&](std::uint64_t at, std::span<std::byte const> bytes) {
                auto const end = at + bytes.size();
                while (next != tensors.end() && next->end() <= at) ++next;
                for (auto it = next; it != tensors.end() && it->begin < end; ++it) {
                    auto const from = std::max(at, it->begin), to = std::min(end, it->end());
                    if (from < to) varve::detail::put(*it->target, from - it->begin, bytes.subspan(from - at, to - from), options.device);
                }
            });
        } else {
            std::vector<std::byte> buffer(piece_bytes);
            for (auto const& t : tensors)
                for (auto at = t.begin; at < t.end();) {
                    auto const n = static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, t.end() - at));
                    detail::read_exactly(fd, buffer.data(), n, at);
                    varve::detail::put(*t.target, at - t.begin, std::span(buffer).first(n), options.device);
                    at += n;
                }
        }
        for (auto const& v : match.values) varve::detail::put(*v.target, 0, std::as_bytes(std::span(v.bytes)), options.device);
        std::vector<std::byte> const zeros(piece_bytes);
        for (auto const* t : match.zeros)
            for (std::uint64_t at = 0; at < t->size_bytes(); at += piece_bytes)
                varve::detail::put(*t, at,
                                   std::span(zeros).first(static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, t->size_bytes() - at))),
                                   options.device);
        if (options.device) options.device->finish();
        return identity;
    }

private:
    static constexpr std::size_t piece_bytes = 1u << 20;

    /// What the last record says; throws errc::not_whole where it is something else.
    static std::uint64_t expected_digest(int fd, detail::zip_directory const& directory) {
        auto const& records = directory.records();
        if (records.empty() || records.back().name != detail::digest_record || records.back().size_bytes != varve::detail::digest_digits)
            throw error(errc::not_whole, "not a whole checkpoint: its last record is not varve/digest");
        auto const text = detail::read_text(fd, detail::data_offset(records.back()), records.back().size_bytes);
        auto const value = varve::detail::parse_hex(text);
        if (!value || detail::crc32(0, std::as_bytes(std::span(text.data(), text.size()))) != records.back().crc)
            throw error(errc::not_whole, "not a whole checkpoint: its record varve/digest is broken");
        return *value;
    }

    static checkpoint_identity identity_of(int fd, detail::zip_directory const& directory) {
        checkpoint_identity out;
        out.step = count(fd, directory, detail::step_record);
        out.sequence = count(fd, directory, detail::sequence_record);
        auto const metadata = detail::json_record(fd, directory, detail::metadata_record, 1);
        if (!metadata.is_object()) detail::refuse_file("its record varve/metadata is no JSON object");
        for (auto const& [key, value] : metadata.items()) {
            if (!value.is_string()) detail::refuse_file("its record varve/metadata has something else than strings");
            out.metadata.emplace(key, value.get<std::string>());
        }
        return out;
    }

    static std::uint64_t count(int fd, detail::zip_directory const& directory, std::string_view name) {
        auto const text = detail::text_record(fd, directory, name);
        std::uint64_t value = 0;
        if (text.empty() || text.size() > 19 || !std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; }))
            detail::refuse_file("its record " + std::string(name.substr(detail::archive_folder.size())) + " is not a count");
        for (char c : text) value = value * 10 + static_cast<std::uint64_t>(c - '0');
        return value;
    }

    /// Reads [0, end) once: visit(offset, bytes) sees each piece before the digest is known to fit.
    template <class Visit>
    static void sweep(int fd, std::uint64_t end, std::uint64_t expected, Visit visit) {
        varve::detail::running_digest digest;
        std::vector<std::byte> buffer(piece_bytes);
        for (std::uint64_t at = 0; at < end;) {
            auto const n = static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, end - at));
            detail::read_exactly(fd, buffer.data(), n, at);
            std::span<std::byte const> const bytes(buffer.data(), n);
            digest.add(bytes);
            visit(at, bytes);
            at += n;
        }
        if (digest.value() != expected)
            throw error(errc::not_whole, "not a whole checkpoint: bytes 0 to " + std::to_string(end) + " do not have the digest in varve/digest");
    }
};

}  // namespace varve::libtorch
