#include "commands.hpp"

#include <ostream>

#include "command_line.hpp"
#include "report.hpp"

namespace varve::tool {

int report(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    namespace po = boost::program_options;
    report_options options;
    std::string input, output;
    auto shown = option_group("Options");
    shown.add_options()("input-dir", po::value(&input)->value_name("D")->default_value("./results"), "folder with results of varve bench")(
        "output-file", po::value(&output)->value_name("F"), "the report (default D/report.md)")("help", "this text");
    if (!parse_command_line(args,
                            "Usage: varve report [options]\nReads every result in a folder and writes a report in Markdown, its charts beside it.\n",
                            shown, {}, out))
        return 0;
    options.input_dir = input;
    options.output_file = output.empty() ? options.input_dir / "report.md" : std::filesystem::path(output);
    return write_report(options, out, err);
}

}  // namespace varve::tool
