#include "settings.hpp"

#include <fcntl.h>
#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <ios>
#include <set>
#include <sstream>

#include <yaml-cpp/yaml.h>
#include <boost/program_options.hpp>

#include "build_config.hpp"
#if VARVE_TOOL_WITH_ASIO
#include "varve/asio/transport.hpp"
#endif
#include "varve/error.hpp"
#include "varve/system.hpp"

#include "errors.hpp"
#include "methods.hpp"
#include "settings_options.hpp"
#include "trainer.hpp"

namespace varve::tool {

namespace {

namespace po = boost::program_options;

std::string in_file(std::string const& option) {
    auto key = option;
    std::replace(key.begin(), key.end(), '-', '_');
    return key;
}

void read_flags(given_settings& given, std::vector<std::string> const& args) {
    po::options_description known;
    known.add_options()("config", po::value<std::vector<std::string>>())("help", po::bool_switch());
    for (auto const& o : option_specs()) {
        if (!o.belongs_to(given.command)) continue;
        if (o.value.empty())
            known.add_options()(o.name.c_str(), po::value<std::string>()->zero_tokens()->implicit_value("true"));
        else if (o.many)
            known.add_options()(o.name.c_str(), po::value<std::vector<std::string>>()->multitoken());
        else
            known.add_options()(o.name.c_str(), po::value<std::vector<std::string>>());
    }
    using style = po::command_line_style::style_t;
    auto parsed = [&] {
        try {
            return po::command_line_parser(args).options(known).style(style::allow_long | style::long_allow_adjacent | style::long_allow_next).run();
        } catch (po::unknown_option const& e) {
            auto name = e.get_option_name();
            name.erase(0, name.find_first_not_of('-'));
            auto nearest = nearest_option(name, given.command);
            throw usage_error("unknown option --" + name + (nearest.empty() ? "; --help lists all" : "; did you mean --" + nearest + "?"));
        } catch (po::error const& e) {
            throw usage_error(e.what());
        }
    }();
    std::set<std::string> seen;
    for (auto const& o : parsed.options) {
        if (o.string_key.empty() || o.position_key >= 0)
            throw usage_error("'" + (o.value.empty() ? std::string() : o.value.front()) + "' is not an option; --help lists all");
        if (!seen.insert(o.string_key).second && o.string_key != "help") throw usage_error("--" + o.string_key + " is given twice");
        std::string joined;
        for (auto const& v : o.value) joined += (joined.empty() ? "" : " ") + v;
        if (o.string_key == "config" && joined.empty()) throw usage_error("--config '': must not be empty");
        if (o.string_key == "config")
            given.file_path = joined;
        else if (o.value.empty())
            given.flags.emplace_back(o.string_key, "true");
        else
            given.flags.emplace_back(o.string_key, joined);
    }
}

std::string scalar(YAML::Node const& node, std::string const& where, bool many) {
    if (node.IsScalar()) return node.Scalar();
    if (node.IsSequence() && many) {
        std::string joined;
        for (auto const& item : node) joined += (joined.empty() ? "" : " ") + scalar(item, where, false);
        return joined;
    }
    throw usage_error(where + (node.IsNull() ? " has no value" : " must be one value"));
}

void read_section(given_settings& given, std::string const& section, YAML::Node const& body) {
    auto const where = given.file_path + ": ";
    if (body.IsNull()) return;
    if (!body.IsMap()) throw usage_error(where + section + " must hold keys and values");
    std::set<std::string> seen;
    for (auto const& entry : body) {
        auto key = entry.first.IsScalar() ? entry.first.Scalar() : std::string("?");
        if (!seen.insert(key).second) throw usage_error(where + section + "." + key + " is given twice");
        std::string right_section;
        option_spec const* found = nullptr;
        for (auto const& o : option_specs()) {
            if (o.section.empty() || in_file(o.name) != key) continue;
            if (o.section == section) found = &o;
            right_section = o.section;
        }
        if (!found)
            throw usage_error(where + "unknown key " + section + "." + key +
                              (right_section.empty() ? "; keys are the options' names with _ for -" : "; it belongs to " + right_section));
        // A key of the other command is no mistake: one file serves both.
        auto value = scalar(entry.second, where + section + "." + key, found->many);
        if (found->belongs_to(given.command)) given.file.emplace_back(found->name, std::move(value));
    }
}

std::string why_unreadable(std::string const& path) {
    if (std::filesystem::is_directory(path)) return "it is a folder";
    file_descriptor const fd(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    return fd ? "it is no text" : last_system_error(errno).message();
}

void read_file(given_settings& given) {
    auto const& path = given.file_path;
    YAML::Node root;
    try {
        std::ifstream in(path);
        if (!in) throw YAML::BadFile(path);
        auto const documents = YAML::LoadAll(in);
        if (documents.size() > 1) throw usage_error(path + ": has " + std::to_string(documents.size()) + " documents; give one");
        if (!documents.empty()) root = documents.front();
    } catch (YAML::BadFile const&) {
        throw usage_error("cannot read the configuration file '" + path + "': " + why_unreadable(path));
    } catch (std::ios_base::failure const&) {
        throw usage_error("cannot read the configuration file '" + path + "': " + why_unreadable(path));
    } catch (YAML::Exception const& e) {
        throw usage_error(path + " is not YAML: line " + std::to_string(e.mark.line + 1) + ": " + e.msg);
    }
    if (root.IsNull()) return;
    if (!root.IsMap()) throw usage_error(path + ": must hold sections model, training, pccheck, run");
    std::set<std::string> seen;
    for (auto const& entry : root) {
        auto section = entry.first.IsScalar() ? entry.first.Scalar() : std::string("?");
        if (section != "model" && section != "training" && section != "pccheck" && section != "run")
            throw usage_error(path + ": unknown section " + section + "; there are model, training, pccheck, run");
        if (!seen.insert(section).second) throw usage_error(path + ": section " + section + " is given twice");
        read_section(given, section, entry.second);
    }
}

void apply_scenario(settings& s, std::string const& scenario) {
    s.run.scenario = scenario;
    if (scenario == "small") {
        s.model.d_model = 256;
        s.model.num_layers = 2;
        s.training.num_samples = 500;
        s.training.num_steps = 50;
        s.training.checkpoint_freq = 10;
    } else if (scenario == "large") {
        s.model.d_model = 1024;
        s.model.num_layers = 12;
        s.training.batch_size = 8;
        s.pccheck.num_threads = 16;
    } else if (scenario == "frequency") {
        s.run.methods = {"layerwise"};
    } else if (scenario == "monitor") {
        s.run.methods = {"layerwise", "layerwise-monitor"};
    } else if (!scenario.empty() && scenario != "medium" && scenario != "all") {
        throw usage_error("--scenario '" + scenario + "': must be small, medium, large, frequency, monitor or all");
    }
}

void apply(settings& s, settings_command command, std::vector<std::pair<std::string, std::string>> const& values, std::string const& file) {
    for (auto const& [name, value] : values) {
        if (name == "help") {
            s.command.help = true;
            continue;
        }
        if (name == "scenario") continue;
        auto const* spec = find_option(name, command);
        try {
            spec->set(s, value);
        } catch (usage_error const& e) {
            auto where = file.empty() ? "--" + name : file + ": " + spec->section + "." + in_file(name);
            throw usage_error(where + " '" + value + "': " + e.what());
        }
    }
}

}  // namespace

bool given_settings::has(std::string_view option) const {
    auto named = [&](auto const& pair) { return pair.first == option; };
    return std::any_of(file.begin(), file.end(), named) || std::any_of(flags.begin(), flags.end(), named);
}

given_settings read_settings(settings_command command, std::vector<std::string> const& args) {
    given_settings given;
    given.command = command;
    read_flags(given, args);
    if (!given.file_path.empty()) read_file(given);
    return given;
}

settings resolve(given_settings const& given, std::string const& scenario) {
    settings s;
    apply_scenario(s, scenario);
    apply(s, given.command, given.file, given.file_path);
    apply(s, given.command, given.flags, {});
    return s;
}

namespace {

void check_monitor(settings const& s, settings_command command) {
    auto const given = int(!s.run.cert.empty()) + int(!s.run.key.empty()) + int(!s.run.ca.empty());
    if (given != 0 && given != 3) throw usage_error("--cert, --key and --ca go together: TLS shows a certificate on both sides");
    if (given != 0 && s.run.monitor.empty() && s.run.peer.empty())
        throw usage_error("--cert, --key and --ca go with --monitor tcp:HOST:PORT or --peer");
    if (!s.run.peer.empty() && (!s.pccheck.use_monitor || !s.run.monitor.empty()))
        throw usage_error("--peer goes with --use-monitor: a monitor that runs already has its own");
    auto const methods = command == settings_command::train ? std::vector{s.command.method} : s.run.methods;
    if (s.run.durable_interval > 0) {
        bool const monitored = s.wants_monitor() || std::ranges::any_of(tool::methods(), [&](auto const& m) {
                                   return m.needs_monitor && std::ranges::find(methods, m.name) != methods.end();
                               });
        if (!monitored || busy_mode(s) != when_busy::replace)
            throw usage_error("--durable-interval goes with a monitor and --when-busy replace: what waits for the disk gives way to the next save");
        for (auto const& m : methods)
            if (s.wants_monitor() && m.find("+sync+") != std::string::npos)
                throw usage_error("--durable-interval: with " + m + " every save is waited for until it is durable");
    }
    if (!s.wants_monitor()) return;
    char const* option = s.run.monitor.empty() ? "--use-monitor" : "--monitor";
    if (!VARVE_TOOL_WITH_ASIO)
        throw usage_error(std::string(option) + ": the monitor is not built; install Boost 1.78 or newer and liburing, and build again");
#if VARVE_TOOL_WITH_ASIO
    bool over_tcp = false;
    try {
        over_tcp = !s.run.monitor.empty() && !asio::parse_address(s.run.monitor).is_unix();
    } catch (error const& e) {
        throw usage_error(std::string("--monitor: ") + e.what());
    }
    auto const expect_reachable = [&](std::string const& method) {
        if (over_tcp && method.starts_with("gds+") && method.ends_with("+cufile"))
            throw usage_error(method + ": a pool in GPU memory is for a monitor on this machine; take pinned for one over TCP");
    };
    std::ranges::for_each(methods, expect_reachable);
#endif
    if (command != settings_command::train || s.command.method.empty()) return;
    if (s.command.method != "none" && !runnable_method(s.command.method).takes_monitor)
        throw usage_error(std::string(option) + ": " + s.command.method +
                          " cannot go through a monitor; take original, layerwise, or a combination with a file sink");
}

/// The result says what was asked for, in JSON.
void check_text(settings const& s) {
    auto const json = to_json(s);
    for (auto const& [section, values] : json.items())
        for (auto const& [key, value] : values.items()) {
            try {
                value.dump();
            } catch (nlohmann::json::exception const&) {
                auto option = key;
                std::replace(option.begin(), option.end(), '_', '-');
                throw usage_error("--" + option + ": is no UTF-8, as the result has to be");
            }
        }
}

}  // namespace

void check_settings(settings const& s, settings_command command) {
    if (command == settings_command::bench) check_text(s);
    check_monitor(s, command);
    chosen_update(s);  // throws for what this LibTorch does not have
    if (chosen_device(s) != "cuda" && s.run.gpu_snapshot == "on")
        throw usage_error("--gpu-snapshot on: there is no CUDA in this run; leave it at auto or off");
    if (s.model.d_model % s.model.nhead != 0)
        throw usage_error("--nhead " + std::to_string(s.model.nhead) + " must divide --d-model " + std::to_string(s.model.d_model));
    if (command == settings_command::train) {
        if (s.command.method.empty()) throw usage_error("--method is missing: say which, for instance --method layerwise");
        if (s.command.dir.empty()) throw usage_error("--dir is missing: say where the checkpoints are, for instance --dir ./run1");
        if (s.command.overwrite && !s.command.fresh) throw usage_error("--overwrite goes with --fresh");
        if (s.command.fresh && s.command.from_step) throw usage_error("--fresh and --from-step exclude each other");
    } else if (s.training.checkpoint_freq > s.training.num_steps &&
               std::any_of(s.run.methods.begin(), s.run.methods.end(), [](auto const& m) { return m != "none"; })) {
        throw usage_error("--checkpoint-freq " + std::to_string(s.training.checkpoint_freq) + ": no checkpoint is due in --num-steps " +
                          std::to_string(s.training.num_steps));
    }
}

nlohmann::json to_json(settings const& s) {
    nlohmann::json out;
    for (auto const& o : option_specs())
        if (!o.section.empty()) {
            auto value = o.get(s);
            if (value.is_string() && value.get_ref<std::string const&>().empty()) continue;  // nothing there: absent
            out[o.section][in_file(o.name)] = std::move(value);
        }
    return out;
}

settings settings_from_json(nlohmann::json const& sections) {
    settings s;
    for (auto const& o : option_specs()) {
        if (o.section.empty() || !sections.contains(o.section)) continue;
        auto const& section = sections.at(o.section);
        auto found = section.find(in_file(o.name));
        if (found == section.end()) continue;
        std::string value;
        if (found->is_array())
            for (auto const& item : *found) value += (value.empty() ? "" : " ") + item.get<std::string>();
        else
            value = found->is_string() ? found->get<std::string>() : found->dump();
        o.set(s, value);
    }
    return s;
}

std::string settings_help(settings_command command) {
    std::ostringstream out;
    settings const defaults;
    auto group = [&](std::string const& title, std::string const& section) {
        out << '\n' << title << ":\n";
        for (auto const& o : option_specs()) {
            if (o.section != section || !o.belongs_to(command)) continue;
            auto left = "  --" + o.name + (o.value.empty() ? "" : " " + o.value);
            left.resize(std::max<std::size_t>(left.size() + 1, 28), ' ');
            out << left << o.help;
            auto value = o.get(defaults);
            if (value.is_array()) {
                out << " (default";
                for (auto const& item : value) out << ' ' << item.get<std::string>();
                out << ')';
            } else if (value.is_number() || (value.is_string() && !value.get<std::string>().empty())) {
                out << " (default " << (value.is_string() ? value.get<std::string>() : value.dump()) << ')';
            }
            out << '\n';
        }
    };
    if (command == settings_command::train) group("Run", "");
    group("Model", "model");
    group("Training", "training");
    group("Checkpoints", "pccheck");
    group(command == settings_command::bench ? "Comparison and checkpoints" : "More", "run");
    if (command == settings_command::bench) group("Other", "");
    out << "  --config FILE.yaml        sections model, training, pccheck, run; keys are the options with _ for -\n"
           "  --help                    this text\n";
    return out.str();
}

when_busy busy_mode(settings const& s) {
    return s.run.when_busy == "skip" ? when_busy::skip : s.run.when_busy == "replace" ? when_busy::replace : when_busy::block;
}

prepare_mode preparation(settings const& s) {
    return s.run.prepare == "allocate" ? prepare_mode::allocate : s.run.prepare == "none" ? prepare_mode::none : prepare_mode::write;
}

namespace {

// In double: with silly sizes the product does not fit into 64 bits, and that is what the caller wants to find out.
double parameter_count(settings const& s) {
    double const d = double(s.model.d_model), f = double(s.model.dim_feedforward), v = double(s.model.vocab_size);
    double const layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d;
    return v * d + 512 * d + double(s.model.num_layers) * layer + v * d + v;
}

std::uint64_t clamped(double bytes) { return bytes > 9e18 ? std::uint64_t(9e18) : std::uint64_t(bytes); }

}  // namespace

std::uint64_t estimated_checkpoint_bytes(settings const& s) { return clamped(12 * parameter_count(s)); }

std::uint64_t estimated_training_bytes(settings const& s) {
    double const tokens = double(s.training.batch_size) * double(s.training.seq_len);
    double const d = double(s.model.d_model), f = double(s.model.dim_feedforward);
    // What backward keeps: a dozen tensors of width d a layer, the feed-forward's two, the attention's two, logits and their gradient.
    double const attention = 2 * tokens * double(s.training.seq_len) * double(s.model.nhead);
    double const activations = double(s.model.num_layers) * (tokens * (12 * d + 2 * f) + attention) + 3 * tokens * double(s.model.vocab_size);
    double const data = 8.0 * double(s.training.num_samples) * double(s.training.seq_len + 1);
    return clamped(16 * parameter_count(s) + 4 * activations + data);
}

}  // namespace varve::tool
