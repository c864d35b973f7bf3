#include "commands.hpp"

#include <ostream>

#include <boost/program_options.hpp>

#include "errors.hpp"
#include "report.hpp"

namespace varve::tool {

int report(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    namespace po = boost::program_options;
    report_options options;
    std::string input, output;
    po::options_description known(
        "Usage: varve report --input-dir D --output-file F\nReads every result in D and writes a report in Markdown, its charts beside it");
    known.add_options()("input-dir", po::value(&input)->value_name("D")->default_value("./results"), "folder with results of varve bench")(
        "output-file", po::value(&output)->value_name("F"), "the report (default D/report.md)")("help", "this text");
    po::variables_map values;
    try {
        using style = po::command_line_style::style_t;
        auto const parsed =
            po::command_line_parser(args).options(known).style(style::allow_long | style::long_allow_adjacent | style::long_allow_next).run();
        for (auto const& o : parsed.options)
            if (o.position_key >= 0 || o.string_key.empty()) throw usage_error("'" + o.value.front() + "' is not an option; --help lists all");
        po::store(parsed, values);
        po::notify(values);
    } catch (po::error const& e) {
        throw usage_error(std::string(e.what()) + "; --help lists all");
    }
    if (values.count("help")) {
        out << known;
        return 0;
    }
    options.input_dir = input;
    options.output_file = output.empty() ? options.input_dir / "report.md" : std::filesystem::path(output);
    return write_report(options, out, err);
}

}  // namespace varve::tool
