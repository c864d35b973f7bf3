#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace varve::detail {

/// Length of the well-formed UTF-8 sequence at the front of `text`, 0 if there is none.
/// Source: The Unicode Standard, table 3-7.
constexpr std::size_t utf8_sequence(std::string_view text) noexcept {
    auto at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    auto continues = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xBF) { return i < text.size() && at(i) >= low && at(i) <= high; };
    if (text.empty()) return 0;
    unsigned first = at(0);
    if (first < 0x80) return 1;
    if (first >= 0xC2 && first <= 0xDF) return continues(1) ? 2 : 0;
    if (first >= 0xE0 && first <= 0xEF) {
        bool second = continues(1, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF);
        return second && continues(2) ? 3 : 0;
    }
    if (first >= 0xF0 && first <= 0xF4) {
        bool second = continues(1, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF);
        return second && continues(2) && continues(3) ? 4 : 0;
    }
    return 0;
}

constexpr bool is_utf8(std::string_view text) noexcept {
    while (!text.empty()) {
        auto n = utf8_sequence(text);
        if (n == 0) return false;
        text.remove_prefix(n);
    }
    return true;
}

/// Appends `text`, valid UTF-8, as a JSON string: only what JSON asks for is escaped.
inline void append_json_string(std::string& out, std::string_view text) {
    out += '"';
    for (char c : text) {
        auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (byte < 0x20) {
            out += "\\u00";
            out += "0123456789abcdef"[byte >> 4];
            out += "0123456789abcdef"[byte & 15];
        } else {
            out += c;
        }
    }
    out += '"';
}

/// A name as people get to see it: UTF-8 as it is; control characters (C0, DEL, C1) and what is not UTF-8 as \xNN,
/// line and paragraph separators and what turns the direction of writing as \uNNNN, so that one name is one line.
inline std::string printable(std::string_view text) {
    std::string out;
    auto digit = [](unsigned v) { return "0123456789abcdef"[v & 15]; };
    while (!text.empty()) {
        auto n = utf8_sequence(text);
        auto first = static_cast<unsigned char>(text[0]);
        unsigned code = first;
        if (n == 2) code = (first & 0x1Fu) << 6 | (static_cast<unsigned char>(text[1]) & 0x3Fu);
        if (n == 3) code = (first & 0x0Fu) << 12 | (static_cast<unsigned char>(text[1]) & 0x3Fu) << 6 | (static_cast<unsigned char>(text[2]) & 0x3Fu);
        bool separates = n == 3 && ((code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069));
        if (n == 0 || code < 0x20 || (n <= 2 && code >= 0x7F && code < 0xA0)) {
            out += "\\x";
            out += digit(code >> 4);
            out += digit(code);
        } else if (separates) {
            out += "\\u";
            for (int shift = 12; shift >= 0; shift -= 4) out += digit(code >> shift);
        } else {
            out += text.substr(0, n);
        }
        text.remove_prefix(n == 0 ? 1 : n);
    }
    return out;
}

}  // namespace varve::detail
