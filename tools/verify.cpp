#include <ostream>

#include <sys/stat.h>
#include <nlohmann/json.hpp>

#include "varve/detail/safetensors_outline.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"

#include "checkpoint_file.hpp"
#include "command_line.hpp"
#include "commands.hpp"
#include "progress.hpp"
#include "store_reader.hpp"
#include "table.hpp"

namespace varve::tool {

namespace {

struct judgement {
    std::filesystem::path path;
    bool whole = false;
    bool gone = false;  ///< a writer let it go meanwhile
    std::string says;   ///< why not; or what it is
};

judgement judge(std::filesystem::path const& path, bool structure_only, std::ostream& err) {
    judgement out{path, false, false, {}};
    try {
        auto fd = open_to_read(path);
        struct stat info{};
        ::fstat(fd.get(), &info);
        auto size = size_text(static_cast<std::uint64_t>(info.st_size));
        auto format = format_of(fd.get());
        if (structure_only && format->extension() == ".safetensors") {
            auto outline = detail::read_outline(fd.get());
            out.says = "structure whole, " + std::to_string(outline.tensor_count) + " tensors, " + size;
        } else if (structure_only) {
            format->identify(fd.get());
            out.says = "structure whole, " + size;
        } else {
            reading_progress shown(err, detail::printable(path.string()), static_cast<std::uint64_t>(info.st_size));
            format->verify(fd.get(), reading_workers());
            auto identity = format->identify(fd.get());
            out.says = "whole, step " + std::to_string(identity.step) + ", sequence " + std::to_string(identity.sequence) + ", " + size;
        }
        out.whole = true;
    } catch (error const& e) {
        if (e.code() == errc::unsupported) throw error(e.code(), detail::printable(path.string()) + ": " + e.what());
        out.gone = was_let_go(e, path);
        out.says = e.what();
    }
    return out;
}

}  // namespace

int verify(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    auto shown = option_group("Options");
    shown.add_options()("structure", "check header and structure alone: for files of others, which have no digests (default: every byte)")(
        "json", "JSON")("help", "this text");
    auto values = parse_command_line(args,
                                     "Usage: varve verify PATH [options]\nChecks a checkpoint by its content, or every checkpoint of a store: exit "
                                     "code 0 if all are whole, 1 if not.\n",
                                     shown, {"PATH"}, out);
    if (!values) return 0;
    std::filesystem::path const path = (*values)["PATH"].as<std::string>();
    bool const structure_only = values->count("structure") > 0;
    bool const json = values->count("json") > 0;
    bool const is_store = std::filesystem::is_directory(path);
    std::vector<judgement> judged;
    for (auto const& file : is_store ? checkpoint_paths(path) : std::vector{path}) {
        auto j = judge(file, structure_only, err);
        if (!is_store && j.gone)
            throw error(std::make_error_code(std::errc::no_such_file_or_directory), detail::printable(path.string()) + ": " + j.says);
        if (j.gone) continue;
        // Reading a large store takes minutes: each file as soon as it is known.
        if (!json) out << detail::printable(j.path.string()) << ": " << (j.whole ? "" : "BROKEN: ") << j.says << std::endl;
        judged.push_back(std::move(j));
    }
    if (judged.empty()) throw error(errc::no_checkpoint, detail::printable(path.string()) + ": holds no checkpoint");
    bool all = true;
    for (auto const& j : judged) all = all && j.whole;
    if (json) {
        nlohmann::ordered_json answer{{"whole", all}, {"files", nlohmann::ordered_json::array()}};
        for (auto const& j : judged) answer["files"].push_back({{"path", j.path.string()}, {"whole", j.whole}, {"says", j.says}});
        out << answer.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
    }
    return all ? 0 : 1;
}

}  // namespace varve::tool
