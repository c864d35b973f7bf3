#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "varve/detail/digest.hpp"
#include "varve/detail/parallel.hpp"
#include "varve/detail/range_reader.hpp"
#include "varve/detail/safetensors_outline.hpp"
#include "varve/device_memory.hpp"

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
using destination = std::pair<std::byte*, std::size_t>;

/// How much is read at once from the page cache: it stays in a core's cache until it is hashed and handed on.
inline constexpr std::size_t piece_bytes = 256u << 10;

/// A worker's memory for the granule at hand: its own, or a piece that a device lends, which the whole granule goes through.
class granule_memory {
public:
    explicit granule_memory(device_memory* lender) : lender_(lender) {
        static_assert(granule_bytes + range_reader::slack_bytes <= device_memory::piece_bytes);
        if (!lender_) own_.emplace(granule_bytes + range_reader::slack_bytes);
    }
    granule_memory(granule_memory&& other) noexcept
        : lender_(std::exchange(other.lender_, nullptr)), own_(std::move(other.own_)), lent_(std::exchange(other.lent_, {})) {}
    granule_memory& operator=(granule_memory&&) = delete;
    ~granule_memory() { end(); }

    bool is_lent() const noexcept { return lender_ != nullptr; }
    void begin() {
        if (lender_) lent_ = lender_->borrow();
    }
    void end() noexcept {
        if (!lent_.empty()) lender_->give_back(std::exchange(lent_, {}));
    }

    /// Where the byte at `offset` of the file goes, of a granule whose first one stands at `first`. In the worker's own memory
    /// every piece goes to the same place, which stays in the core's cache.
    std::byte* place(std::uint64_t first, std::uint64_t offset) const noexcept {
        return lender_ ? lent_.data() + (offset - first / range_reader::alignment * range_reader::alignment)
                       : own_->data() + offset % range_reader::alignment;
    }

private:
    device_memory* lender_;
    std::optional<aligned_buffer> own_;
    std::span<std::byte> lent_;
};

/// What takes no bytes: for a sweep that only checks.
struct no_consumer {
    static device_memory* lender() noexcept { return nullptr; }
    static bool wants(std::uint64_t, std::uint64_t) noexcept { return true; }
    static destination at(std::uint64_t, std::size_t size) noexcept { return {nullptr, size}; }
    static void take(std::uint64_t, std::span<std::byte const>) noexcept {}
};

/// Reads the granules that the consumer wants on `workers` threads and checks each against its digest.
///
/// On any thread: wants(begin, end) says whether a range of the data is needed; at(offset, size) where up to `size`
/// bytes from there (a multiple of a chunk, or all of them) go; take(offset, bytes) gets those that came through a buffer.
/// Bytes in the page cache go straight to their destination and are hashed there; those from the disk through a buffer.
/// Where lender() is a device, each granule goes through a piece of its memory, and to take as a whole once its digest fits.
/// Throws errc::not_whole for the first granule that does not fit its digest; its bytes may have been handed on by then.
template <class Consumer>
void sweep_granules(int fd, safetensors_outline const& outline, unsigned workers, bool check_digests, Consumer const& consumer) {
    range_reader const reader(fd);
    auto const data_bytes = outline.extent.data_bytes();
    auto make_worker = [&] {
        return [&, memory = granule_memory(consumer.lender())](std::uint64_t granule) mutable {
            auto const begin = granule * granule_bytes;
            auto const end = std::min<std::uint64_t>(begin + granule_bytes, data_bytes);
            if (!consumer.wants(begin, end)) return;
            auto const first = outline.extent.data_offset + begin;
            memory.begin();
            std::array<std::uint64_t, chunks_per_granule> chunks;
            std::size_t chunk_count = 0;
            bool cached = reader.is_cached(first);
            for (auto at = begin; at < end;) {
                auto size = static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, end - at));
                std::byte* to = nullptr;
                if (!memory.is_lent()) std::tie(to, size) = consumer.at(at, size);
                auto const offset = outline.extent.data_offset + at;
                bool const buffered = !to || !cached || reader.read_cached(to, offset, size) < size;
                if (buffered) {
                    to = memory.place(first, offset);
                    auto const there = cached ? reader.read_cached(to, offset, size) : 0;
                    cached = there == size;
                    if (!cached) {
                        size = static_cast<std::size_t>(end - at);  // where one piece is not cached, the rest rarely is
                        reader.read(to, offset, size, there);
                    }
                }
                if (check_digests) chunk_count += chunk_digests({to, size}, std::span(chunks).subspan(chunk_count));
                if (buffered && !memory.is_lent()) consumer.take(at, {to, size});
                at += size;
            }
            auto expected = [&] { return parse_hex(std::string_view(*outline.digests).substr(granule * digest_digits, digest_digits)); };
            if (check_digests && expected() != granule_digest(std::span(chunks).first(chunk_count))) refuse_granule(fd, outline.extent, granule);
            if (memory.is_lent()) consumer.take(begin, {memory.place(first, first), static_cast<std::size_t>(end - begin)});
            memory.end();
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
