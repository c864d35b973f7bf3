#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace varve::libtorch::detail {

static_assert(std::endian::native == std::endian::little, "varve: the torch archive is written on little-endian machines only");

/// A record of a zip file, stored as it is. Every byte around its data follows from these four, so a reader can rebuild
/// them and compare. Source: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
struct zip_record {
    std::string name;
    std::uint64_t offset = 0;  ///< of its local header
    std::uint64_t size_bytes = 0;
    std::uint32_t crc = 0;

    friend bool operator==(zip_record const&, zip_record const&) = default;
};

/// Tensors' bytes begin at multiples of this in the file, as torch.save has it.
inline constexpr std::uint64_t zip_alignment = 64;
/// Sizes, offsets from this on stand in 64-bit fields.
inline constexpr std::uint64_t zip64_from = 0xFFFFFFFF;

inline constexpr std::size_t local_header_bytes = 30;
inline constexpr std::size_t central_record_bytes = 46;
inline constexpr std::size_t end_record_bytes = 22;
inline constexpr std::size_t end_record64_bytes = 56;
inline constexpr std::size_t end_locator_bytes = 20;

inline constexpr std::uint32_t local_signature = 0x04034b50;
inline constexpr std::uint32_t descriptor_signature = 0x08074b50;
inline constexpr std::uint32_t central_signature = 0x02014b50;
inline constexpr std::uint32_t end_signature = 0x06054b50;
inline constexpr std::uint32_t end64_signature = 0x06064b50;
inline constexpr std::uint32_t locator_signature = 0x07064b50;

/// Little-endian numbers, one after the other.
class zip_bytes {
public:
    zip_bytes& u16(std::uint64_t v) { return number(v, 2); }
    zip_bytes& u32(std::uint64_t v) { return number(v, 4); }
    zip_bytes& u64(std::uint64_t v) { return number(v, 8); }
    zip_bytes& text(std::string_view s) {
        out_ += s;
        return *this;
    }
    zip_bytes& fill(std::size_t n, char c) {
        out_.append(n, c);
        return *this;
    }
    std::string take() { return std::move(out_); }

private:
    zip_bytes& number(std::uint64_t v, int bytes) {
        for (int i = 0; i < bytes; ++i) out_ += static_cast<char>(v >> (8 * i));
        return *this;
    }
    std::string out_;
};

inline bool is_large(zip_record const& r) noexcept { return r.size_bytes >= zip64_from; }

/// Names in UTF-8; checksum and sizes follow the data, so that the data passes once.
inline constexpr std::uint16_t zip_flags = 0x0808;
inline constexpr std::uint16_t zip_date = 0x0021;  // 1980-01-01, whenever it was written
inline std::uint16_t zip_version(bool large) noexcept { return large ? 45 : 20; }

/// What stands before a record's data; padded so that the data is aligned.
inline std::string local_header(zip_record const& r) {
    bool const large = is_large(r);
    std::size_t const zip64 = large ? 20 : 0;
    auto const unpadded = r.offset + local_header_bytes + r.name.size() + zip64 + 4;
    auto const padding = static_cast<std::size_t>((zip_alignment - unpadded % zip_alignment) % zip_alignment);
    zip_bytes out;
    out.u32(local_signature).u16(zip_version(large)).u16(zip_flags).u16(0).u16(0).u16(zip_date).u32(0);
    out.u32(large ? 0xFFFFFFFF : 0).u32(large ? 0xFFFFFFFF : 0).u16(r.name.size()).u16(zip64 + 4 + padding).text(r.name);
    if (large) out.u16(1).u16(16).u64(r.size_bytes).u64(r.size_bytes);
    out.text("FB").u16(padding).fill(padding, 'Z');
    return out.take();
}

/// What stands behind it.
inline std::string data_descriptor(zip_record const& r) {
    zip_bytes out;
    out.u32(descriptor_signature).u32(r.crc);
    if (is_large(r))
        out.u64(r.size_bytes).u64(r.size_bytes);
    else
        out.u32(r.size_bytes).u32(r.size_bytes);
    return out.take();
}

inline std::size_t data_descriptor_bytes(zip_record const& r) noexcept { return is_large(r) ? 24 : 16; }

/// Its record in the central directory.
inline std::string central_record(zip_record const& r) {
    bool const large = is_large(r), far = r.offset >= zip64_from;
    std::size_t const extra = (large ? 16 : 0) + (far ? 8 : 0);
    zip_bytes out;
    out.u32(central_signature).u16(zip_version(large || far)).u16(zip_version(large || far)).u16(zip_flags).u16(0).u16(0).u16(zip_date).u32(r.crc);
    out.u32(large ? 0xFFFFFFFF : r.size_bytes).u32(large ? 0xFFFFFFFF : r.size_bytes);
    out.u16(r.name.size()).u16(extra ? 4 + extra : 0).u16(0).u16(0).u16(0).u32(0).u32(far ? 0xFFFFFFFF : r.offset).text(r.name);
    if (extra) out.u16(1).u16(extra);
    if (large) out.u64(r.size_bytes).u64(r.size_bytes);
    if (far) out.u64(r.offset);
    return out.take();
}

/// The end of the file, behind a central directory of that many records.
inline std::string end_of_directory(std::uint64_t count, std::uint64_t offset, std::uint64_t size_bytes) {
    bool const large = count >= 0xFFFF || offset >= zip64_from || size_bytes >= zip64_from;
    zip_bytes out;
    if (large) {
        out.u32(end64_signature).u64(end_record64_bytes - 12).u16(45).u16(45).u32(0).u32(0).u64(count).u64(count).u64(size_bytes).u64(offset);
        out.u32(locator_signature).u32(0).u64(offset + size_bytes).u32(1);
    }
    out.u32(end_signature).u16(0).u16(0).u16(large ? 0xFFFF : count).u16(large ? 0xFFFF : count);
    out.u32(large ? 0xFFFFFFFF : size_bytes).u32(large ? 0xFFFFFFFF : offset).u16(0);
    return out.take();
}

}  // namespace varve::libtorch::detail
