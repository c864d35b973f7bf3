#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/digest.hpp"
#include "varve/torch/detail/crc32.hpp"
#include "varve/torch/detail/zip_layout.hpp"

namespace varve::libtorch::detail {

/// Writes a zip file in order, in pieces that are large and still in the cache from being hashed: small things are
/// gathered, large ones go out from where they lie.
class zip_writer {
public:
    explicit zip_writer(byte_stream& out) : out_(out) { gathered_.reserve(write_bytes); }

    /// Begins a record of that size, which the next calls to add() fill.
    void begin(std::string name, std::uint64_t size_bytes) {
        records_.push_back({std::move(name), position_, size_bytes, 0});
        raw(bytes_of(local_header(records_.back())));
    }
    void add(std::span<std::byte const> bytes) {
        auto& crc = records_.back().crc;
        if (bytes.size() < gather_below_bytes) {
            crc = crc32(crc, bytes);
            raw(bytes);
            return;
        }
        flush();
        position_ += bytes.size();
        while (!bytes.empty()) {
            auto written = bytes.first(std::min(bytes.size(), write_bytes));
            bytes = bytes.subspan(written.size());
            for (auto rest = written; !rest.empty();) {
                auto piece = rest.first(std::min(rest.size(), hash_bytes));
                rest = rest.subspan(piece.size());
                crc = crc32(crc, piece);
                digest_.add(piece);
            }
            out_.write(written);
        }
    }
    void end() { raw(bytes_of(data_descriptor(records_.back()))); }

    void record(std::string name, std::string_view content) {
        begin(std::move(name), content.size());
        add(bytes_of(content));
        end();
    }

    /// XXH3-64 of all bytes so far.
    std::uint64_t digest() {
        flush();
        return digest_.value();
    }

    /// The central directory and the end; nothing may follow.
    void finish() {
        auto const offset = position_;
        for (auto const& r : records_) raw(bytes_of(central_record(r)));
        raw(bytes_of(end_of_directory(records_.size(), offset, position_ - offset)));
        flush();
    }

private:
    static constexpr std::size_t hash_bytes = 256u << 10;  ///< what checksum and digest take in turns: it stays in the cache
    static constexpr std::size_t write_bytes = 4u << 20;
    static constexpr std::size_t gather_below_bytes = 256u << 10;

    static std::span<std::byte const> bytes_of(std::string_view text) noexcept { return std::as_bytes(std::span(text.data(), text.size())); }

    /// What is small enough to be gathered.
    void raw(std::span<std::byte const> bytes) {
        position_ += bytes.size();
        if (gathered_.size() + bytes.size() > write_bytes) flush();
        gathered_.insert(gathered_.end(), bytes.begin(), bytes.end());
    }
    void flush() {
        if (gathered_.empty()) return;
        digest_.add(gathered_);
        out_.write(gathered_);
        gathered_.clear();
    }

    byte_stream& out_;
    varve::detail::running_digest digest_;
    std::uint64_t position_ = 0;
    std::vector<std::byte> gathered_;
    std::vector<zip_record> records_;
};

}  // namespace varve::libtorch::detail
