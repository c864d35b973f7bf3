#include "bench_result.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "varve/error.hpp"
#include "varve/system.hpp"

#include "measure.hpp"
#include "progress.hpp"

namespace varve::tool {

namespace {

using json = nlohmann::json;

bool is_private(std::string const& key) { return !key.empty() && key.front() == '_'; }

json public_part(json const& run) {
    json out = json::object();
    for (auto const& [key, value] : run.items())
        if (!is_private(key)) out[key] = value;
    return out;
}

/// The median of each number, key by key; what some runs lack is left out; a flag is true if it is in all of them.
json medians(std::vector<json> const& runs) {
    auto const& first = runs.front();
    if (first.is_object()) {
        json out = json::object();
        for (auto const& [key, value] : first.items()) {
            std::vector<json> values;
            for (auto const& run : runs)
                if (run.contains(key)) values.push_back(run[key]);
            if (values.size() == runs.size()) out[key] = medians(values);
        }
        return out;
    }
    if (first.is_boolean()) return std::all_of(runs.begin(), runs.end(), [](json const& v) { return v.get<bool>(); });
    if (!first.is_number() || std::all_of(runs.begin(), runs.end(), [&](json const& v) { return v == first; })) return first;
    std::vector<double> values;
    for (auto const& v : runs) values.push_back(v.get<double>());
    if (first.is_number_integer()) return static_cast<std::uint64_t>(percentile(values, 0.5));
    return median(values);
}

void add_ratios(json& run, json const& none, double best_write) {
    double const drained = run["drained_time_sec"], none_drained = none["drained_time_sec"];
    run["overhead_vs_none_percent"] = 100 * (drained / none_drained - 1);
    if (best_write <= 0 || !run.contains("_checkpoint_bytes") || !none.contains("_first_due_sec") || !run.contains("checkpoint")) return;
    // A run ends when its last bytes are on disk: no sooner than training and one more write, or all writes from the first on.
    double const write_sec = run["_checkpoint_bytes"].get<double>() / (best_write * 1e9);
    double const count = run["checkpoint"]["count"].get<double>();
    double const floor = std::max(none_drained + write_sec, none["_first_due_sec"].get<double>() + count * write_sec);
    run["floor_sec"] = floor;
    run["over_floor"] = drained / floor;
}

void find_faults(comparison& out, method_runs const& m, method_runs const& none) {
    auto add = [&](std::size_t r, std::string const& text) {
        out.faults.push_back(m.name + (m.runs.size() > 1 ? ", repeat " + std::to_string(r + 1) : "") + ": " + text);
    };
    for (std::size_t r = 0; r < m.runs.size(); ++r) {
        auto const& run = m.runs[r];
        if (run.value("failed", 0u) > 0) add(r, std::to_string(run["failed"].get<unsigned>()) + " saves failed");
        if (run.contains("restore") && !run["restore"]["bit_exact"].get<bool>()) add(r, "what was restored is not what was saved");
        if (run["_losses"] != none.runs.front()["_losses"]) add(r, "the losses differ from those without checkpoints");
    }
}

}  // namespace

comparison compare_runs(std::vector<method_runs> methods, std::vector<double> const& best_write_gb_per_s) {
    comparison out;
    auto const none = methods.front();
    for (auto& m : methods) {
        find_faults(out, m, none);
        if (m.name != "none")
            for (std::size_t r = 0; r < m.runs.size(); ++r) add_ratios(m.runs[r], none.runs[r], best_write_gb_per_s[r]);
        std::vector<json> shown;
        for (auto const& run : m.runs) shown.push_back(public_part(run));
        auto& result = out.results[m.result_key] = medians(shown);
        if (shown.size() > 1) result["repeats"] = shown;
        if (m.runs.front().contains("_facts")) out.effective[m.result_key] = m.runs.front()["_facts"];
    }
    return out;
}

std::string comparison_table(json const& results, std::vector<std::string> const& order) {
    struct column {
        char const* title;
        char const* path;
    };
    constexpr column columns[] = {
        {"drained s", "/drained_time_sec"},           {"loop s", "/loop_time_sec"},       {"vs none %", "/overhead_vs_none_percent"},
        {"samples/s", "/throughput/samples_per_sec"}, {"save ms", "/checkpoint/mean_ms"}, {"latency ms", "/latency/mean_ms"},
        {"peak GB", "/memory/peak_cpu_gb"},           {"restore ms", "/restore/time_ms"}, {"over floor", "/over_floor"},
        {"bit-exact", "/restore/bit_exact"}};
    std::vector<std::vector<std::string>> rows(1, {"method"});
    for (auto const& c : columns) rows[0].push_back(c.title);
    for (auto const& key : order) {
        auto& row = rows.emplace_back(1, key);
        for (auto const& c : columns) {
            json::json_pointer const path(c.path);
            if (!results.at(key).contains(path))
                row.push_back("-");
            else if (auto const& v = results.at(key).at(path); v.is_boolean())
                row.push_back(v.get<bool>() ? "yes" : "NO");
            else
                row.push_back(short_number(v.get<double>(), 4));
        }
    }
    std::string out;
    for (auto const& row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i) {
            std::size_t width = 0;
            for (auto const& r : rows) width = std::max(width, r[i].size());
            out += i == 0 ? row[i] + std::string(width - row[i].size(), ' ') : "  " + std::string(width - row[i].size(), ' ') + row[i];
        }
        out += '\n';
    }
    return out;
}

namespace {

std::string utc(char const* format) {
    auto const now = std::time(nullptr);
    std::tm parts{};
    gmtime_r(&now, &parts);
    char text[64];
    std::strftime(text, sizeof text, format, &parts);
    return text;
}

}  // namespace

std::string utc_now() { return utc("%Y-%m-%dT%H:%M:%SZ"); }

std::filesystem::path write_result(std::filesystem::path const& dir, std::string const& suffix, json const& document) {
    auto const stem = "comparison_" + utc("%Y%m%d_%H%M%S");
    auto path = dir / (stem + suffix + ".json");
    for (int i = 2; std::filesystem::exists(path); ++i) path = dir / (stem + "_" + std::to_string(i) + suffix + ".json");
    auto const partial = dir / ("." + path.filename().string() + ".partial");
    auto const text = document.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
    auto fail = [&] {
        auto const code = last_system_error(errno);
        ::unlink(partial.c_str());
        throw error(code, "cannot write the result to '" + path.string() + "': " + code.message());
    };
    file_descriptor file(::open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), system_calls::kernel());
    if (!file) fail();
    for (std::size_t at = 0; at < text.size();) {
        auto const n = ::write(file.get(), text.data() + at, text.size() - at);
        if (n <= 0) fail();
        at += static_cast<std::size_t>(n);
    }
    if (::fsync(file.get()) != 0 || ::rename(partial.c_str(), path.c_str()) != 0) fail();
    return path;
}

}  // namespace varve::tool
