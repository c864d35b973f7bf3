#include <ostream>

#include <nlohmann/json.hpp>

#include "varve/detail/text.hpp"
#include "varve/error.hpp"

#include "command_line.hpp"
#include "commands.hpp"
#include "store_reader.hpp"
#include "table.hpp"

namespace varve::tool {

int ls(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    auto shown = option_group("Options");
    shown.add_options()("newest", "only the newest (default: all, newest first)")("path", "paths alone, one a line")("json", "JSON; sizes in bytes")(
        "help", "this text");
    auto values = parse_command_line(
        args, "Usage: varve ls D [options]\nLists the checkpoints of the store D; sizes in kB, MB and GB (10^9 bytes).\n", shown, {"D"}, out);
    if (!values) return 0;
    std::filesystem::path const folder = (*values)["D"].as<std::string>();
    auto listed = list_store(folder);
    auto& checkpoints = listed.checkpoints;
    bool const newest = values->count("newest") > 0;
    if (newest && checkpoints.empty()) throw error(errc::no_checkpoint, detail::printable(folder.string()) + ": no whole checkpoint in it");
    if (newest) checkpoints.resize(1);

    if (values->count("json")) {
        nlohmann::ordered_json json{
            {"store", folder.string()}, {"checkpoints", nlohmann::ordered_json::array()}, {"broken", nlohmann::ordered_json::array()}};
        for (auto const& c : checkpoints)
            json["checkpoints"].push_back({{"step", c.step}, {"sequence", c.sequence}, {"bytes", c.size_bytes}, {"path", c.path.string()}});
        for (auto const& b : listed.broken) json["broken"].push_back({{"path", b.path.string()}, {"why", b.why}});
        out << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
        return 0;
    }
    for (auto const& b : listed.broken) err << "broken: " << detail::printable(b.path.string()) << ": " << b.why << '\n';
    if (values->count("path")) {
        for (auto const& c : checkpoints) out << c.path.string() << '\n';
        return 0;
    }
    if (checkpoints.empty()) {
        err << detail::printable(folder.string()) << ": no checkpoints\n";
        return 0;
    }
    table rows({">step", ">sequence", ">size", "file"});
    for (auto const& c : checkpoints)
        rows.add({std::to_string(c.step), std::to_string(c.sequence), size_text(c.size_bytes), detail::printable(c.path.filename().string())});
    out << rows;
    return 0;
}

}  // namespace varve::tool
