#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "varve/detail/text.hpp"

namespace varve::tool {

/// Bytes as people read them: B, then kB, MB and GB in powers of 1,000.
inline std::string size_text(std::uint64_t bytes) {
    if (bytes < 1000) return std::to_string(bytes) + " B";
    char text[32];
    auto value = static_cast<double>(bytes);
    if (bytes < 1'000'000)
        std::snprintf(text, sizeof text, "%.1f kB", value / 1e3);
    else if (bytes < 1'000'000'000)
        std::snprintf(text, sizeof text, "%.1f MB", value / 1e6);
    else
        std::snprintf(text, sizeof text, "%.3f GB", value / 1e9);
    return text;
}

/// Columns that stand below each other, two blanks apart; nothing is cut. A column may stand to the right.
class table {
public:
    /// A header that begins with '>' makes its column stand to the right.
    explicit table(std::vector<std::string> headers) {
        for (auto& h : headers) {
            right_.push_back(h.starts_with('>'));
            if (right_.back()) h.erase(0, 1);
        }
        rows_.push_back(std::move(headers));
    }

    void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

    friend std::ostream& operator<<(std::ostream& out, table const& t) {
        std::vector<std::size_t> widths(t.right_.size());
        for (auto const& row : t.rows_)
            for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], width(row[c]));
        for (auto const& row : t.rows_) {
            std::string line;
            for (std::size_t c = 0; c < row.size(); ++c) {
                std::string const blanks(widths[c] - width(row[c]), ' ');
                line += t.right_[c] ? blanks + row[c] : row[c] + blanks;
                line += "  ";
            }
            line.erase(line.find_last_not_of(' ') + 1);
            out << line << '\n';
        }
        return out;
    }

private:
    /// Code points: good enough for names.
    static std::size_t width(std::string_view text) {
        return static_cast<std::size_t>(
            std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
    }

    std::vector<bool> right_;
    std::vector<std::vector<std::string>> rows_;
};

}  // namespace varve::tool
