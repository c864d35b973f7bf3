#pragma once

#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <boost/program_options.hpp>

#include "errors.hpp"

namespace varve::tool {

/// Options under a caption, for lines of the length that help has.
inline boost::program_options::options_description option_group(std::string const& caption) {
    return boost::program_options::options_description(caption, 120);
}

/// Parses what follows a command's name: `shown` are its options, `help` among them; `positional` names what it takes besides, each once.
/// Prints the help and returns nothing where --help was given; throws usage_error for anything that has no meaning.
inline std::optional<boost::program_options::variables_map> parse_command_line(std::vector<std::string> const& args, std::string const& usage,
                                                                               boost::program_options::options_description const& shown,
                                                                               std::vector<std::string> const& positional, std::ostream& out) {
    namespace po = boost::program_options;
    po::options_description known;
    known.add(shown);
    po::positional_options_description places;
    for (auto const& name : positional) {
        known.add_options()(name.c_str(), po::value<std::string>(), "");
        places.add(name.c_str(), 1);
    }
    po::variables_map values;
    try {
        using style = po::command_line_style::style_t;
        po::store(po::command_line_parser(args)
                      .options(known)
                      .positional(places)
                      .style(style::allow_long | style::long_allow_adjacent | style::long_allow_next)
                      .run(),
                  values);
        po::notify(values);
    } catch (po::too_many_positional_options_error const&) {
        throw usage_error("too many arguments; --help shows what it takes");
    } catch (po::error const& e) {
        throw usage_error(std::string(e.what()) + "; --help lists all options");
    }
    if (values.count("help")) {
        out << usage << '\n' << shown;
        return std::nullopt;
    }
    for (auto const& name : positional)
        if (!values.count(name)) throw usage_error("no " + name + " given; --help shows what it takes");
    return values;
}

}  // namespace varve::tool
