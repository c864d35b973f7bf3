#pragma once

#include <sys/stat.h>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "varve/detail/header_source.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"
#include "varve/torch/detail/zip_layout.hpp"

namespace varve::libtorch::detail {

using varve::detail::read_exactly;
using varve::detail::refuse_file;

inline constexpr std::uint64_t max_directory_bytes = 64u << 20;

/// Where a record's data begins.
inline std::uint64_t data_offset(zip_record const& r) { return r.offset + local_header(r).size(); }

inline std::string read_text(int fd, std::uint64_t offset, std::uint64_t size_bytes) {
    std::string out(static_cast<std::size_t>(size_bytes), '\0');
    read_exactly(fd, out.data(), out.size(), offset);
    return out;
}

inline std::uint64_t little_endian(std::string_view bytes, std::size_t at, std::size_t size) noexcept {
    std::uint64_t v = 0;
    for (std::size_t i = size; i-- > 0;) v = v << 8 | static_cast<unsigned char>(bytes[at + i]);
    return v;
}

/// The records of a zip file as varve writes them: all that is not a record's data is rebuilt from the directory and compared with
/// the file, so that no byte of it is left to chance. Memory grows with the directory, which is bounded.
class zip_directory {
public:
    /// Throws errc::malformed.
    explicit zip_directory(int fd) {
        struct stat info{};
        if (::fstat(fd, &info) != 0) throw_if(last_system_error(errno), "cannot read the file's size");
        file_bytes_ = static_cast<std::uint64_t>(info.st_size);
        if (file_bytes_ < end_record_bytes) refuse_file("it is too short for a zip file");
        read_end(fd, file_bytes_);
        auto const directory = read_text(fd, offset_, size_bytes_);
        parse(directory);
        std::string rebuilt;
        rebuilt.reserve(directory.size());
        for (auto const& r : records_) rebuilt += central_record(r);
        if (rebuilt != directory) refuse_file("its central directory is not one that varve writes");
        check_records(fd);
    }

    zip_directory(zip_directory const&) = delete;
    zip_directory& operator=(zip_directory const&) = delete;

    std::uint64_t file_bytes() const noexcept { return file_bytes_; }
    std::vector<zip_record> const& records() const noexcept { return records_; }
    zip_record const* find(std::string_view name) const noexcept {
        auto it = by_name_.find(name);
        return it == by_name_.end() ? nullptr : it->second;
    }

private:
    void read_end(int fd, std::uint64_t size) {
        auto const end = read_text(fd, size - end_record_bytes, end_record_bytes);
        if (little_endian(end, 0, 4) != end_signature) refuse_file("it does not end as a zip file of varve's does");
        count_ = little_endian(end, 10, 2);
        size_bytes_ = little_endian(end, 12, 4);
        offset_ = little_endian(end, 16, 4);
        std::uint64_t const ends = end_record_bytes + end_locator_bytes + end_record64_bytes;
        if (count_ == 0xFFFF && size >= ends) {
            auto const end64 = read_text(fd, size - ends, end_record64_bytes);
            count_ = little_endian(end64, 32, 8);
            size_bytes_ = little_endian(end64, 40, 8);
            offset_ = little_endian(end64, 48, 8);
        }
        if (size_bytes_ > max_directory_bytes) refuse_file("its central directory is larger than 64 MiB");
        if (offset_ > size || size_bytes_ > size - offset_ || count_ > size_bytes_ / central_record_bytes)
            refuse_file("its central directory lies outside of it");
        auto const tail = offset_ + size_bytes_;
        auto const expected = end_of_directory(count_, offset_, size_bytes_);
        if (size - tail != expected.size() || read_text(fd, tail, expected.size()) != expected)
            refuse_file("its end record does not fit its central directory");
    }

    void parse(std::string_view directory) {
        records_.reserve(static_cast<std::size_t>(count_));
        std::size_t at = 0;
        auto need = [&](std::size_t n) {
            if (directory.size() - at < n) refuse_file("its central directory ends within a record");
        };
        for (std::uint64_t i = 0; i < count_; ++i) {
            need(central_record_bytes);
            auto field = [&](std::size_t offset, std::size_t n) { return little_endian(directory, at + offset, n); };
            zip_record r;
            r.crc = static_cast<std::uint32_t>(field(16, 4));
            r.size_bytes = field(24, 4);
            r.offset = field(42, 4);
            auto const name = static_cast<std::size_t>(field(28, 2)), extra = static_cast<std::size_t>(field(30, 2));
            need(central_record_bytes + name + extra);
            r.name = directory.substr(at + central_record_bytes, name);
            std::size_t wide = at + central_record_bytes + name + 4;
            auto const wide_end = at + central_record_bytes + name + extra;
            auto widen = [&](std::uint64_t& v, std::size_t skip) {
                if (v != 0xFFFFFFFF) return;
                if (wide + 8 * skip > wide_end) refuse_file("its central directory lacks a 64-bit field");
                v = little_endian(directory, wide, 8);
                wide += 8 * skip;
            };
            widen(r.size_bytes, 2);
            widen(r.offset, 1);
            at = wide_end;
            records_.push_back(std::move(r));
        }
        if (at != directory.size()) refuse_file("its central directory has bytes behind its records");
    }

    /// Each record begins where the one before it ends, and what stands around its data is as the directory says.
    void check_records(int fd) {
        std::uint64_t at = 0;
        for (auto const& r : records_) {
            auto wrong = [&](char const* what) { refuse_file("record " + varve::detail::printable(r.name) + ' ' + what); };
            if (!by_name_.emplace(r.name, &r).second) wrong("is there twice");
            auto const header = local_header(r);
            auto const descriptor = data_descriptor_bytes(r);
            if (r.offset != at || header.size() > offset_ - at || r.size_bytes > offset_ - at - header.size() ||
                descriptor > offset_ - at - header.size() - r.size_bytes)
                wrong("is not where the central directory says");
            if (read_text(fd, at, header.size()) != header) wrong("has a header that does not fit the central directory");
            at += header.size() + r.size_bytes;
            if (read_text(fd, at, descriptor) != data_descriptor(r)) wrong("has a checksum that does not fit the central directory");
            at += descriptor;
        }
        if (at != offset_) refuse_file("it has bytes between its records and its central directory");
    }

    std::uint64_t file_bytes_ = 0;
    std::uint64_t count_ = 0, size_bytes_ = 0, offset_ = 0;
    std::vector<zip_record> records_;
    std::map<std::string_view, zip_record const*> by_name_;  ///< names of the file's choice: no hash table, which they could make slow
};

}  // namespace varve::libtorch::detail
