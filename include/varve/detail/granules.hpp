#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "varve/detail/digest.hpp"
#include "varve/detail/parallel.hpp"
#include "varve/detail/range_reader.hpp"
#include "varve/detail/safetensors_outline.hpp"

namespace varve::detail {

/// Collects the names of the tensors that overlap a range of the data, for a message.
class overlap_visitor {
public:
    overlap_visitor(std::uint64_t begin, std::uint64_t end) : begin_(begin), end_(end) {}

    void tensor(header_entry const& e) {
        if (e.begin >= end_ || e.end <= begin_ || e.begin == e.end) return;
        // A file made to have millions of tensors in one granule does not get a message of their size.
        if (names_.size() > max_message_bytes)
            ++left_out_;
        else
            names_ += (names_.empty() ? "" : ", ") + printable(e.name);
    }
    void metadata(std::string const&, std::string const&, std::uint64_t) noexcept {}

    std::string text() const { return left_out_ == 0 ? names_ : names_ + " and " + std::to_string(left_out_) + " more"; }

private:
    static constexpr std::size_t max_message_bytes = 64u << 10;
    std::uint64_t begin_;
    std::uint64_t end_;
    std::string names_;
    std::uint64_t left_out_ = 0;
};

[[noreturn]] inline void refuse_granule(int fd, safetensors_extent const& extent, std::uint64_t granule) {
    auto begin = granule * granule_bytes;
    auto end = std::min<std::uint64_t>(begin + granule_bytes, extent.data_bytes());
    overlap_visitor overlaps(begin, end);
    visit_header(fd, extent, overlaps);
    refuse_as_not_whole("bytes " + std::to_string(extent.data_offset + begin) + " to " + std::to_string(extent.data_offset + end) +
                        " of the file do not fit their digest; tensors there: " + overlaps.text());
}

/// Where bytes of the data are to go: to `memory`, or (where that is null) through a buffer to whoever consumes them.
struct destination {
    std::byte* memory = nullptr;
    std::size_t size_bytes = 0;
};

/// How much is read at once from the page cache: it stays in a core's cache until it is hashed and handed on.
inline constexpr std::size_t piece_bytes = 256u << 10;

/// What takes no bytes: for a sweep that only checks.
struct no_consumer {
    static bool wants(std::uint64_t, std::uint64_t) noexcept { return true; }
    static destination at(std::uint64_t, std::size_t size) noexcept { return {nullptr, size}; }
    static void take(std::uint64_t, std::span<std::byte const>) noexcept {}
};

/// Reads the granules that the consumer wants on `workers` threads and checks each against its digest.
///
/// On any thread: wants(begin, end) says whether a range of the data is needed; at(offset, size) where up to `size`
/// bytes from there (a multiple of a chunk, or all of them) go; take(offset, bytes) gets those that came through a buffer.
/// Bytes in the page cache go straight to their destination and are hashed there; those from the disk through a buffer.
/// Throws errc::not_whole for the first granule that does not fit its digest; its bytes may have been handed on by then.
template <class Consumer>
void sweep_granules(int fd, safetensors_outline const& outline, unsigned workers, bool check_digests, Consumer const& consumer) {
    range_reader const reader(fd);
    auto const data_bytes = outline.extent.data_bytes();
    auto make_worker = [&] {
        return [&, scratch = aligned_buffer(granule_bytes + range_reader::slack_bytes)](std::uint64_t granule) {
            auto const begin = granule * granule_bytes;
            auto const end = std::min<std::uint64_t>(begin + granule_bytes, data_bytes);
            if (!consumer.wants(begin, end)) return;
            std::array<std::uint64_t, chunks_per_granule> chunks;
            std::size_t chunk_count = 0;
            for (auto at = begin; at < end;) {
                auto [to, size] = consumer.at(at, static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, end - at)));
                auto const offset = outline.extent.data_offset + at;
                bool const buffered = !to || reader.read_cached(to, offset, size) < size;
                if (buffered) {
                    to = range_reader::place(scratch, offset);
                    if (auto cached = reader.read_cached(to, offset, size); cached < size) {
                        size = static_cast<std::size_t>(end - at);  // where one piece is not cached, the rest rarely is
                        reader.read(scratch, offset, size, cached);
                    }
                }
                if (check_digests) chunk_count += chunk_digests({to, size}, std::span(chunks).subspan(chunk_count));
                if (buffered) consumer.take(at, {to, size});
                at += size;
            }
            auto expected = [&] { return parse_hex(std::string_view(*outline.digests).substr(granule * digest_digits, digest_digits)); };
            if (check_digests && expected() != granule_digest(std::span(chunks).first(chunk_count))) refuse_granule(fd, outline.extent, granule);
        };
    };
    for_each_index(granule_count(data_bytes), workers, make_worker);
}

/// Every byte of the data against its digest, and the header against its own.
inline void verify_whole(int fd, safetensors_outline const& outline, unsigned workers) {
    expect_whole_header(fd, outline);
    sweep_granules(fd, outline, workers, true, no_consumer{});
}

}  // namespace varve::detail
