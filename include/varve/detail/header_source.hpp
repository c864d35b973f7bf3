#pragma once

#include <unistd.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "varve/detail/safetensors_rules.hpp"
#include "varve/error.hpp"

namespace varve::detail {

[[noreturn]] inline void refuse_file(std::string const& line) { throw error(errc::malformed, "malformed file: " + line); }

/// Reads exactly `size` bytes; throws the system's error, or errc::malformed where the file ends before them.
inline void read_exactly(int fd, void* to, std::size_t size, std::uint64_t offset) {
    for (std::size_t done = 0; done < size;) {
        auto n = ::pread(fd, static_cast<std::byte*>(to) + done, size - done, static_cast<off_t>(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_if(last_system_error(errno), "cannot read at byte " + std::to_string(offset + done));
        if (n == 0) refuse_file("it ends at byte " + std::to_string(offset + done) + ", before what its header promises");
        done += static_cast<std::size_t>(n);
    }
}

/// The text of a JSON header as a stream of characters in constant memory, whatever the file holds: blanks between tokens
/// come as one, and a token longer than max_header_string_bytes or a NUL (an end of input to the parser) is refused.
class header_source {
public:
    header_source(int fd, std::uint64_t begin, std::uint64_t end) : fd_(fd), at_(begin), end_(end), buffer_end_(begin) { settle(); }

    header_source(header_source const&) = delete;
    header_source& operator=(header_source const&) = delete;

    bool at_end() const noexcept { return at_ == end_; }
    char current() const noexcept { return buffer_[static_cast<std::size_t>(at_ - buffer_begin_)]; }
    /// Offset in the file of the character that comes next.
    std::uint64_t offset() const noexcept { return at_; }

    void advance() {
        char c = current();
        ++at_;
        if (in_string_) {
            if (++token_bytes_ > max_header_string_bytes) refuse_file("a string in the header is longer than 16 MiB");
            if (escaped_)
                escaped_ = false;
            else if (c == '\\')
                escaped_ = true;
            else if (c == '"')
                in_string_ = false;
            settle();
        } else if (is_blank(c)) {
            token_bytes_ = 0;
            do settle();
            while (!at_end() && is_blank(current()) && (++at_, true));
        } else {
            if (c == '"') {
                in_string_ = true;
                token_bytes_ = 0;
            } else if (++token_bytes_ > max_header_string_bytes) {
                refuse_file("a value in the header is longer than 16 MiB");
            }
            if (c == ',' || c == ':') token_bytes_ = 0;
            settle();
        }
    }

private:
    static bool is_blank(char c) noexcept { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

    /// Makes current() valid.
    void settle() {
        if (at_end()) return;
        if (at_ == buffer_end_) {
            auto n = static_cast<std::size_t>(std::min<std::uint64_t>(buffer_.size(), end_ - at_));
            read_exactly(fd_, buffer_.data(), n, at_);
            buffer_begin_ = at_;
            buffer_end_ = at_ + n;
        }
        if (current() == '\0') refuse_file("a NUL in the header, at byte " + std::to_string(at_));
    }

    int fd_;
    std::uint64_t at_;
    std::uint64_t end_;
    std::uint64_t buffer_begin_ = 0;
    std::uint64_t buffer_end_;
    std::size_t token_bytes_ = 0;
    bool in_string_ = false;
    bool escaped_ = false;
    std::array<char, 64u << 10> buffer_;
};

/// The input iterator over a header_source that nlohmann's parser asks for; the default-constructed one is the end.
class header_iterator {
public:
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = char const*;
    using reference = char;
    using iterator_category = std::input_iterator_tag;

    header_iterator() = default;
    explicit header_iterator(header_source& source) : source_(&source) {}

    char operator*() const noexcept { return source_->current(); }
    header_iterator& operator++() {
        source_->advance();
        return *this;
    }
    void operator++(int) { source_->advance(); }
    friend bool operator==(header_iterator const& a, header_iterator const& b) noexcept { return a.ended() == b.ended(); }

private:
    bool ended() const noexcept { return !source_ || source_->at_end(); }

    header_source* source_ = nullptr;
};

}  // namespace varve::detail
