#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "settings.hpp"

namespace varve::tool {

/// One option of bench or train: how it is called, what it says in --help, and where its value goes.
struct option_spec {
    std::string name;     ///< as in "d-model"; in the file "d_model"
    std::string section;  ///< of the file; empty: given on the command line alone
    std::string value;    ///< placeholder in --help; empty for a switch
    std::string help;     ///< with the unit and the usual range
    bool bench = true;
    bool train = true;
    bool many = false;                                         ///< takes several values
    std::function<void(settings&, std::string const&)> set{};  ///< throws usage_error that says what is wrong with the value
    std::function<nlohmann::json(settings const&)> get{};

    bool belongs_to(settings_command c) const { return c == settings_command::bench ? bench : train; }
};

/// Every option, in the order of --help.
std::vector<option_spec> const& option_specs();

/// The spec of that name, or nullptr.
option_spec const* find_option(std::string_view name, settings_command command);

/// The option name that is most like `name`, or an empty text if none is.
std::string nearest_option(std::string_view name, settings_command command);

}  // namespace varve::tool
