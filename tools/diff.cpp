#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>
#include <ostream>
#include <sstream>
#include <utility>

#include "varve/detail/text.hpp"

#include "checkpoint_file.hpp"
#include "command_line.hpp"
#include "commands.hpp"
#include "element_difference.hpp"
#include "progress.hpp"
#include "store_reader.hpp"
#include "table.hpp"

namespace varve::tool {

namespace {

std::string form_of(file_tensor const& t) {
    std::string out(name(t.type));
    out += " [";
    for (std::size_t i = 0; i < t.shape.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(t.shape[i]);
    return out + "]";
}

std::string number(long double value) {
    char text[48];
    std::snprintf(text, sizeof text, "%.9Lg", value);
    return text;
}

element_difference compare(checkpoint_file const& a, file_tensor const& in_a, checkpoint_file const& b, file_tensor const& in_b) {
    constexpr std::size_t piece_bytes = 1u << 20;
    std::vector<std::byte> left(std::min<std::uint64_t>(piece_bytes, in_a.size_bytes)), right(left.size());
    element_difference out;
    for (std::uint64_t at = 0; at < in_a.size_bytes; at += piece_bytes) {
        auto size = static_cast<std::size_t>(std::min<std::uint64_t>(piece_bytes, in_a.size_bytes - at));
        a.read(in_a, at, std::span(left).first(size));
        b.read(in_b, at, std::span(right).first(size));
        out.add(in_a.type, std::span(left).first(size), std::span(right).first(size));
    }
    return out;
}

}  // namespace

int diff(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    auto shown = option_group("Options");
    shown.add_options()("help", "this text");
    auto values = parse_command_line(
        args,
        "Usage: varve diff A B\nCompares the tensors of two checkpoints: names, shapes, dtypes and bits, and the largest difference of values.\n"
        "Exit code 0 if the bits are the same, 1 if not. Of a store the newest checkpoint is compared.\n",
        shown, {"A", "B"}, out);
    if (!values) return 0;
    auto const a = open_newest((*values)["A"].as<std::string>());
    auto const b = open_newest((*values)["B"].as<std::string>());
    std::map<std::string_view, file_tensor const*> in_b;
    for (auto const& t : b->tensors()) in_b.emplace(t.name, &t);

    std::uint64_t unlike = 0, compared = 0, bytes = 0, different = 0;
    long double largest = 0;
    std::string largest_in;
    std::optional<reading_progress> reading(std::in_place, err, "compares", a->file_bytes() + b->file_bytes());
    std::ostringstream unlike_ones;
    table rows({"tensor with other bits", ">elements", ">of", ">largest difference"});
    for (auto const& t : a->tensors()) {
        auto found = in_b.find(t.name);
        if (found == in_b.end()) {
            unlike_ones << "only in A: " << detail::printable(t.name) << "  " << form_of(t) << '\n';
            ++unlike;
            continue;
        }
        auto const& other = *found->second;
        in_b.erase(found);
        if (t.type != other.type || t.shape != other.shape) {
            unlike_ones << "another form: " << detail::printable(t.name) << "  A " << form_of(t) << ", B " << form_of(other) << '\n';
            ++unlike;
            continue;
        }
        ++compared;
        bytes += t.size_bytes;
        auto const d = compare(*a, t, *b, other);
        if (d.elements == 0) continue;
        ++different;
        auto note = d.not_numbers == 0 ? "" : "; " + std::to_string(d.not_numbers) + " not finite";
        rows.add(
            {detail::printable(t.name), std::to_string(d.elements), std::to_string(t.size_bytes / element_bytes(t.type)), number(d.largest) + note});
        if (largest_in.empty() || d.largest > largest) {
            largest = d.largest;
            largest_in = detail::printable(t.name);
        }
    }
    for (auto const& t : b->tensors())
        if (in_b.contains(t.name)) {
            unlike_ones << "only in B: " << detail::printable(t.name) << "  " << form_of(t) << '\n';
            ++unlike;
        }
    reading.reset();
    out << unlike_ones.str();
    if (different > 0) out << rows;
    if (different == 0 && unlike == 0) {
        out << "same bits: " << compared << " tensors, " << size_text(bytes) << '\n';
        return 0;
    }
    out << "not the same: " << different << " of " << compared << " tensors that both have differ in bits, " << unlike << " in name, dtype or shape";
    if (different > 0) out << "; largest difference " << number(largest) << " in " << largest_in;
    out << '\n';
    return 1;
}

}  // namespace varve::tool
