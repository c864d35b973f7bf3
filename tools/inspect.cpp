#include <ostream>

#include <nlohmann/json.hpp>

#include "varve/detail/digest.hpp"
#include "varve/detail/safetensors_rules.hpp"
#include "varve/detail/text.hpp"

#include "checkpoint_file.hpp"
#include "command_line.hpp"
#include "commands.hpp"
#include "table.hpp"

namespace varve::tool {

namespace {

std::string shape_text(std::vector<std::int64_t> const& shape) {
    std::string out = "[";
    for (auto d : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(d);
    return out + "]";
}

void print_json(std::string const& path, checkpoint_file const& file, std::ostream& out) {
    using json = nlohmann::ordered_json;
    json tensors = json::array();
    for (auto const& t : file.tensors())
        tensors.push_back(
            {{"name", t.name}, {"dtype", std::string(name(t.type))}, {"shape", t.shape}, {"offset", t.offset_bytes}, {"bytes", t.size_bytes}});
    json metadata = json::object();
    for (auto const& [key, value] : file.metadata()) metadata[key] = value;
    json all{{"file", path}, {"format", std::string(file.format_name())}, {"bytes", file.file_bytes()}, {"metadata", metadata}, {"tensors", tensors}};
    out << all.dump(2, ' ', false, json::error_handler_t::replace) << '\n';
}

void print_text(std::string const& path, checkpoint_file const& file, std::ostream& out) {
    std::uint64_t bytes = 0;
    for (auto const& t : file.tensors()) bytes += t.size_bytes;
    out << detail::printable(path) << ": " << file.format_name() << ", " << size_text(file.file_bytes()) << ", " << file.tensors().size()
        << " tensors of " << size_text(bytes) << "\n";
    if (!file.metadata().empty()) {
        out << '\n';
        table rows({"metadata", "value"});
        for (auto const& [key, value] : file.metadata()) {
            bool const digests = key == detail::digests_key;  // thousands of digits tell nobody anything; --json has them
            rows.add(
                {detail::printable(key), digests ? std::to_string(value.size() / detail::digest_digits) + " digests" : detail::printable(value)});
        }
        out << rows;
    }
    out << '\n';
    table rows({"tensor", "dtype", "shape", ">size", ">offset"});
    for (auto const& t : file.tensors())
        rows.add(
            {detail::printable(t.name), std::string(name(t.type)), shape_text(t.shape), size_text(t.size_bytes), std::to_string(t.offset_bytes)});
    out << rows;
}

}  // namespace

int inspect(std::vector<std::string> const& args, std::ostream& out, std::ostream&) {
    auto shown = option_group("Options");
    shown.add_options()("json", "JSON; sizes and offsets in bytes")("help", "this text");
    auto values = parse_command_line(args,
                                     "Usage: varve inspect FILE [options]\nShows what is in a checkpoint, of varve or of anyone else: metadata and "
                                     "tensors in the order of the file.\n",
                                     shown, {"FILE"}, out);
    if (!values) return 0;
    auto const& path = (*values)["FILE"].as<std::string>();
    auto file = open_checkpoint(path);
    if (values->count("json"))
        print_json(path, *file, out);
    else
        print_text(path, *file, out);
    return 0;
}

}  // namespace varve::tool
