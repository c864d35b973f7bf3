#include "report_data.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <fstream>
#include <map>
#include <ostream>
#include <stdexcept>
#include <system_error>

namespace varve::tool::reporting {

namespace {

namespace fs = std::filesystem;

struct known_method {
    std::string_view name, label, colour;
};

// In the order in which a reader compares them: the reference, what everybody does, then the better ones.
constexpr std::array<known_method, 5> known_methods{{
    {none_name, "none", "#8d99a6"},
    {traditional_name, "traditional", "#c8553d"},
    {durable_name, "traditional, durable", "#8a3324"},
    {"Original PCCheck", "original", "#e0a030"},
    {"Layerwise PCCheck (Improved)", "layerwise", "#1f7a8c"},
}};

constexpr std::array<std::string_view, 7> other_colours{"#6a4c93", "#5b8c5a", "#3d5a98", "#b56576", "#7f5539", "#4d908e", "#9a8c28"};

std::size_t rank_of(std::string_view name) {
    auto const found = std::find_if(known_methods.begin(), known_methods.end(), [&](known_method const& known) { return known.name == name; });
    return static_cast<std::size_t>(found - known_methods.begin());
}

constexpr std::uintmax_t largest_result_bytes = 256U << 20U;
constexpr int deepest_result = 64;

// Why a file is no result, in a word or two; an empty string where it is one.
std::string read_result(fs::path const& path, result_file& result) {
    std::error_code error;
    if (auto const size = fs::file_size(path, error); error || size > largest_result_bytes) return error ? error.message() : "too large";
    std::ifstream stream(path, std::ios::binary);
    if (!stream) return "unreadable";
    // Copies and comparisons of a document recurse: nothing that is deep enough to matter gets in.
    bool too_deep = false;
    auto const shallow = [&](int depth, json::parse_event_t, json&) {
        too_deep = too_deep || depth > deepest_result;
        return depth <= deepest_result;
    };
    result.document = json::parse(stream, shallow, false);
    if (too_deep) return "too deep";
    if (result.document.is_discarded()) return "malformed";
    auto const* results = find_value(result.document, "results");
    if (results == nullptr || !results->is_object()) return "no results";
    for (auto const& [name, values] : results->items())
        if (values.is_object()) result.methods.push_back({plain_text(name), {}, {}, values});
    if (result.methods.empty()) return "empty results";
    result.file_name = plain_text(path.filename().string());
    return {};
}

void order_methods(result_file& result) {
    std::stable_sort(result.methods.begin(), result.methods.end(), [](auto const& a, auto const& b) {
        auto const rank_a = rank_of(a.name), rank_b = rank_of(b.name);
        return rank_a != rank_b ? rank_a < rank_b : a.name < b.name;
    });
}

void name_methods(std::vector<result_file>& results) {
    std::map<std::string, std::size_t> others;
    for (auto const& result : results)
        for (auto const& method : result.methods)
            if (rank_of(method.name) == known_methods.size()) others.emplace(method.name, 0);
    std::size_t next = 0;
    for (auto& [name, index] : others) index = next++;
    for (auto& result : results)
        for (auto& method : result.methods) {
            auto const rank = rank_of(method.name);
            auto const known = rank < known_methods.size();
            method.label = known ? std::string(known_methods[rank].label) : method.name;
            method.colour = known ? known_methods[rank].colour : other_colours[others.at(method.name) % other_colours.size()];
        }
}

// What two results must share for their frequencies to be one sweep.
std::string sweep_key(result_file const& result) {
    json key = json::object();
    if (!result.checkpoint_freq()) key["file"] = result.file_name;
    for (auto const* path : {"config.model", "config.training", "config.pccheck"})
        if (auto const* value = find_value(result.document, path)) key[path] = *value;
    if (key.contains("config.training") && key["config.training"].is_object()) key["config.training"].erase("checkpoint_freq");
    if (auto const* run = find_value(result.document, "config.run"); run && run->is_object())
        for (auto const& [name, value] : run->items())
            if (name != "checkpoint_dir" && name != "output_dir" && name != "events" && name != "keep_checkpoints") key["config.run." + name] = value;
    for (auto const* path : {"machine.cpu", "machine.gpu", "version"})
        if (auto const* value = find_value(result.document, path)) key[path] = *value;
    return key.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string title_of(result_file const& result) {
    auto title = result.text("config.run.scenario");
    title = title.empty() ? "Comparison" : "Scenario " + title;
    auto const width = result.number("config.model.d_model"), layers = result.number("config.model.num_layers");
    if (width && layers) title += ", d_model " + format_number(*width, 6) + ", " + format_number(*layers, 6) + " layers";
    for (auto const& method : result.methods)
        if (auto const size = method.number("io_performance.data_size_gb")) {
            title += ", " + format_number(*size) + " GB a checkpoint";
            break;
        }
    return title;
}

}  // namespace

json const* find_value(json const& object, std::string_view path) {
    auto const* value = &object;
    for (;;) {
        auto const dot = path.find('.');
        if (!value->is_object()) return nullptr;
        auto const found = value->find(std::string(path.substr(0, dot)));
        if (found == value->end()) return nullptr;
        value = &*found;
        if (dot == std::string_view::npos) return value;
        path.remove_prefix(dot + 1);
    }
}

std::optional<double> find_number(json const& object, std::string_view path) {
    auto const* value = find_value(object, path);
    if (value == nullptr || !value->is_number()) return std::nullopt;
    auto const number = value->get<double>();
    return std::isfinite(number) ? std::optional(number) : std::nullopt;
}

std::string find_text(json const& object, std::string_view path) {
    auto const* value = find_value(object, path);
    if (value == nullptr || value->is_null() || value->is_structured()) return {};
    return plain_text(value->is_string() ? value->get<std::string>() : value->dump());
}

std::vector<double> method_result::repeats(std::string_view path) const {
    std::vector<double> numbers;
    auto const* list = find_value(values, "repeats");
    if (list == nullptr || !list->is_array() || list->size() < 2) return numbers;
    for (auto const& repeat : *list)
        if (auto const number = find_number(repeat, path)) numbers.push_back(*number);
    // Pairing needs them all: with one missing nobody knows which.
    return numbers.size() == list->size() ? numbers : std::vector<double>{};
}

method_result const* result_file::method(std::string_view name) const {
    auto const found = std::find_if(methods.begin(), methods.end(), [&](auto const& m) { return m.name == name; });
    return found == methods.end() ? nullptr : &*found;
}

method_result const* result_file::none() const { return method(none_name); }

method_result const* result_file::traditional() const {
    auto const* found = method(traditional_name);
    return found != nullptr ? found : method(durable_name);
}

std::string result_file::frequency_words() const {
    auto const every = checkpoint_freq();
    if (!every) return {};
    return *every == 1 ? "every step" : "every " + format_number(*every, 9) + " steps";
}

std::vector<result_file> load_results(fs::path const& folder, std::ostream& err) {
    auto const shown = "'" + plain_text(folder.string()) + "'";
    std::error_code error;
    if (!fs::is_directory(folder, error))
        throw std::runtime_error("input folder " + shown +
                                 " is not a folder: give --input-dir the folder that "
                                 "varve bench wrote its results to");
    std::vector<fs::path> paths;
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error))
        if (std::error_code ignored; entry->path().extension() == ".json" && entry->is_regular_file(ignored)) paths.push_back(entry->path());
    if (error) throw std::runtime_error("cannot read folder " + shown + " (" + error.message() + "): check its permissions");
    std::sort(paths.begin(), paths.end());

    std::vector<result_file> results;
    for (auto const& path : paths) {
        result_file result;
        if (auto const reason = read_result(path, result); !reason.empty()) {
            err << "skipped " << plain_text(path.string()) << ": " << reason << '\n';
            continue;
        }
        order_methods(result);
        results.push_back(std::move(result));
    }
    if (results.empty()) throw std::runtime_error("no result in folder " + shown + ": run varve bench --output-dir with it first");
    std::stable_sort(results.begin(), results.end(),
                     [](result_file const& a, result_file const& b) { return a.text("started") < b.text("started"); });
    name_methods(results);
    return results;
}

std::vector<result_group> group_results(std::vector<result_file> const& results) {
    std::vector<result_group> groups, earlier;
    std::map<std::string, std::size_t> sweeps;
    // Newest first, so that of two runs of the same thing the later one is in the sweep.
    for (auto result = results.rbegin(); result != results.rend(); ++result) {
        auto const [at, fresh] = sweeps.emplace(sweep_key(*result), groups.size());
        if (fresh) {
            groups.push_back({title_of(*result), {&*result}, false});
            continue;
        }
        auto& files = groups[at->second].files;
        auto const every = result->checkpoint_freq();
        auto const taken = std::any_of(files.begin(), files.end(), [&](result_file const* file) { return file->checkpoint_freq() == every; });
        if (taken)
            earlier.push_back({title_of(*result), {&*result}, true});
        else
            files.push_back(&*result);
    }
    std::reverse(groups.begin(), groups.end());
    for (auto& group : groups)
        std::sort(group.files.begin(), group.files.end(),
                  [](result_file const* a, result_file const* b) { return a->checkpoint_freq() < b->checkpoint_freq(); });
    groups.insert(groups.end(), earlier.begin(), earlier.end());
    for (auto& group : groups) {
        std::string every;
        for (auto const* file : group.files)
            if (auto const number = file->checkpoint_freq()) every += (every.empty() ? "" : ", ") + format_number(*number, 9);
        if (!every.empty()) group.title += ", every " + (every == "1" ? std::string("step") : every + " steps");
        if (group.earlier) group.title += " (earlier run, " + group.files.front()->file_name + ")";
    }
    return groups;
}

std::string format_number(double value, int digits) {
    auto const size = std::abs(value);
    // The place of the leading digit after rounding to so many digits: 9.996 with three is 10.0, not 10.00.
    auto exponent = size > 0 ? static_cast<int>(std::floor(std::log10(size))) : 0;
    if (size > 0 && size + 0.5 * std::pow(10.0, exponent - digits + 1) >= std::pow(10.0, exponent + 1)) ++exponent;
    auto const decimals = size == 0 ? 0 : std::clamp(digits - 1 - exponent, 0, 9);
    std::array<char, 400> buffer{};
    auto const end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::fixed, decimals);
    std::string text(buffer.data(), end.ptr);
    // A whole number that was asked for with many digits is a count: it needs no zeros behind the point.
    if (digits > 4 && text.find('.') != std::string::npos) {
        text.erase(text.find_last_not_of('0') + 1);
        if (text.back() == '.') text.pop_back();
    }
    return text == "-0" ? "0" : text;
}

std::string plain_text(std::string_view text) {
    std::string plain;
    for (std::size_t i = 0; i < text.size(); ++i) {
        auto const byte = static_cast<unsigned char>(text[i]);
        auto const next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0U;
        auto const third = i + 2 < text.size() ? static_cast<unsigned char>(text[i + 2]) : 0U;
        if (byte < 0x20 || byte == 0x7f) {
            plain += ' ';
        } else if (byte == 0xc2 && next >= 0x80 && next < 0xa0) {  // C1 controls
            plain += ' ';
            ++i;
        } else if (byte == 0xe2 && ((next == 0x80 && third >= 0xa8 && third <= 0xae) ||
                                    (next == 0x81 && third >= 0xa6 && third <= 0xa9))) {  // line ends, text direction
            plain += ' ';
            i += 2;
        } else {
            plain += text[i];
        }
    }
    return plain;
}

std::string markdown_text(std::string_view text) {
    auto const plain = plain_text(text);
    auto const inside_word = [&](std::size_t i) {
        auto const word = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); };
        return i > 0 && i + 1 < plain.size() && word(plain[i - 1]) && word(plain[i + 1]);
    };
    std::string escaped;
    for (std::size_t i = 0; i < plain.size(); ++i) {
        if (plain[i] == '&') {
            escaped += "&amp;";
            continue;
        }
        // An underscore inside a word, as names of settings have it, is no markup.
        auto const special = std::string_view("\\`*_{}[]<>#|~$").find(plain[i]) != std::string_view::npos;
        if (special && !(plain[i] == '_' && inside_word(i))) escaped += '\\';
        escaped += plain[i];
    }
    return escaped;
}

}  // namespace varve::tool::reporting
