#include "report_data.hpp"

#include <algorithm>
#include <functional>

namespace varve::tool::reporting {

namespace {

constexpr std::string_view absent = "–";

struct row {
    result_file const* file;
    method_result const* method;
};

struct column {
    std::string header;
    std::function<std::string(row const&)> cell;  ///< Empty where it does not apply.
};

// A number with its smallest and largest repeat behind it.
column number(std::string header, std::string path, int digits = 3) {
    auto cell = [path = std::move(path), digits](row const& at) {
        auto const value = at.method->number(path);
        if (!value) return std::string();
        auto text = format_number(*value, digits);
        if (auto const repeats = at.method->repeats(path); !repeats.empty()) {
            auto const [least, most] = std::minmax_element(repeats.begin(), repeats.end());
            auto const low = format_number(*least, digits), high = format_number(*most, digits);
            if (low != high) text += " (" + low + " to " + high + ")";
        }
        return text;
    };
    return {std::move(header), std::move(cell)};
}

column count(std::string header, std::string path) {
    auto cell = [path = std::move(path)](row const& at) {
        auto const value = at.method->number(path);
        return value ? format_number(*value, 9) : std::string();
    };
    return {std::move(header), std::move(cell)};
}

// A number that says something only where it is not 0: without a GPU its columns go.
column unless_zero(column inner) {
    auto cell = [inner = std::move(inner.cell)](row const& at) {
        auto text = inner(at);
        return text == "0" ? std::string() : text;
    };
    return {std::move(inner.header), std::move(cell)};
}

// How many times better than the reference of the same result; for times smaller is better, for rates larger.
column speed_up(std::string header, std::string path, bool smaller_is_better) {
    auto cell = [path = std::move(path), smaller_is_better](row const& at) {
        auto const* base = at.file->traditional();
        auto const value = at.method->number(path);
        auto const other = base != nullptr ? base->number(path) : std::nullopt;
        if (!value || !other || *value <= 0 || *other <= 0) return std::string();
        return format_number(smaller_is_better ? *other / *value : *value / *other);
    };
    return {std::move(header), std::move(cell)};
}

column exactness() {
    return {"Bit exact", [](row const& at) {
                auto const* value = find_value(at.method->values, "restore.bit_exact");
                if (value == nullptr || !value->is_boolean()) return std::string();
                return std::string(value->get<bool>() ? "yes" : "**no**");
            }};
}

// The methods of a result in their order; where the frequency was swept, each method's frequencies one below the other.
std::vector<row> rows_of(result_group const& group) {
    std::vector<row> rows;
    for (auto const* file : group.files)
        for (auto const& method : file->methods) {
            auto const after = std::find_if(rows.rbegin(), rows.rend(), [&](row const& at) { return at.method->name == method.name; });
            rows.insert(after == rows.rend() ? rows.end() : after.base(), {file, &method});
        }
    return rows;
}

// Rows without any number are left out, and so are columns.
std::string table(std::string const& title, result_group const& group, std::vector<column> columns) {
    auto rows = rows_of(group);
    std::erase_if(columns, [&](column const& c) { return std::all_of(rows.begin(), rows.end(), [&](row const& at) { return c.cell(at).empty(); }); });
    std::erase_if(rows,
                  [&](row const& at) { return std::all_of(columns.begin(), columns.end(), [&](column const& c) { return c.cell(at).empty(); }); });
    if (columns.empty()) return {};
    if (group.swept())
        columns.insert(columns.begin(), {"Every (steps)", [](row const& at) {
                                             auto const every = at.file->checkpoint_freq();
                                             return every ? format_number(*every, 9) : std::string();
                                         }});
    auto text = "**" + title + "**\n\n| Method |", rule = std::string("| --- |");
    for (auto const& c : columns) {
        text += " " + c.header + " |";
        rule += " ---: |";
    }
    text += '\n' + rule + '\n';
    for (auto const& at : rows) {
        text += "| " + markdown_text(at.method->name) + " |";
        for (auto const& c : columns) {
            auto const cell = c.cell(at);
            text += " " + (cell.empty() ? std::string(absent) : cell) + " |";
        }
        text += '\n';
    }
    return text + '\n';
}

// Leaves of an object as rows; what nests deeper than anybody writes is left out.
void flatten(json const& value, std::string const& path, int depth, std::vector<std::pair<std::string, std::string>>& rows) {
    if (value.is_object() && depth < 8) {
        for (auto const& [key, inner] : value.items()) flatten(inner, path.empty() ? key : path + "." + key, depth + 1, rows);
    } else if (value.is_array() && depth < 8) {
        std::string list;
        for (auto const& inner : value)
            if (inner.is_primitive()) list += (list.empty() ? "" : ", ") + (inner.is_string() ? inner.get<std::string>() : inner.dump());
        rows.emplace_back(path, list);
    } else if (value.is_string()) {
        rows.emplace_back(path, value.get<std::string>());
    } else if (value.is_number_float()) {
        rows.emplace_back(path, format_number(value.get<double>(), 5));
    } else if (value.is_primitive() && !value.is_null()) {
        rows.emplace_back(path, value.dump());
    }
}

std::string object_table(json const& object, std::string const& first, std::string const& second) {
    std::vector<std::pair<std::string, std::string>> rows;
    flatten(object, {}, 0, rows);
    if (rows.empty()) return {};
    auto text = "| " + first + " | " + second + " |\n| --- | --- |\n";
    for (auto const& [key, value] : rows) text += "| " + markdown_text(key) + " | " + markdown_text(value) + " |\n";
    return text + '\n';
}

// A block of code whose fence is longer than any run of backticks in it.
std::string code_block(std::string const& code) {
    std::size_t run = 0, longest = 2;
    for (auto const c : code) {
        run = c == '`' ? run + 1 : 0;
        longest = std::max(longest, run);
    }
    std::string const fence(longest + 1, '`');
    return fence + "sh\n" + code + '\n' + fence + "\n\n";
}

std::string configuration(result_file const& file) {
    std::string text;
    for (auto const* section : {"model", "training", "pccheck", "run"}) {
        auto const* value = find_value(file.document, std::string("config.") + section);
        std::vector<std::pair<std::string, std::string>> rows;
        if (value != nullptr) flatten(*value, {}, 0, rows);
        if (rows.empty()) continue;
        text += std::string("- ") + section + ":";
        for (std::size_t i = 0; i < rows.size(); ++i)
            text += (i == 0 ? " " : ", ") + markdown_text(rows[i].first) + " " + markdown_text(rows[i].second);
        text += '\n';
    }
    return text.empty() ? text : text + '\n';
}

}  // namespace

std::string tables(result_group const& group) {
    auto const* base = group.files.front()->traditional();
    auto const over = base != nullptr ? markdown_text(base->name) : std::string();
    auto text = table("Throughput and overhead", group,
                      {number("Throughput (samples/s)", "throughput.samples_per_sec"), number("Drained time (s)", "drained_time_sec"),
                       number("Loop time (s)", "loop_time_sec"), number("Overhead over no checkpoint (%)", "overhead_vs_none_percent"),
                       number("Checkpoint overhead (%)", "checkpoint_overhead_percent"), number("Step (ms)", "training_step.mean_ms"),
                       number("Step std (ms)", "training_step.std_ms"), number("Drained over floor", "over_floor")});
    text += table("Mean save time (training blocked)", group,
                  {number("Mean (ms)", "checkpoint.mean_ms"), number("Std (ms)", "checkpoint.std_ms"), number("Min (ms)", "checkpoint.min_ms"),
                   number("Max (ms)", "checkpoint.max_ms"), number("Total (ms)", "checkpoint.total_ms"), count("Saves", "checkpoint.count"),
                   number("Waiting (ms)", "stall.wait_ms"), unless_zero(number("Waiting on the GPU (ms)", "stall.gpu_wait_ms"))});
    text += table("Latency (begin of a save until it is durable)", group,
                  {number("Mean (ms)", "latency.mean_ms"), number("p50 (ms)", "latency.p50_ms"), number("p99 (ms)", "latency.p99_ms"),
                   number("Checkpoint (GB)", "io_performance.data_size_gb"), number("Mean I/O (GB/s)", "io_performance.mean_io_throughput_gbps"),
                   count("Written", "written"), count("Durable", "durable"), count("Skipped", "skipped"), count("Replaced", "replaced"),
                   count("Failed", "failed")});
    text += table("Memory (the process and its children)", group,
                  {number("Peak (GB)", "memory.peak_cpu_gb"), number("Mean (GB)", "memory.mean_cpu_gb"),
                   unless_zero(number("Peak GPU (GB)", "memory.peak_gpu_gb"))});
    if (base != nullptr)
        text += table("Speed-up over " + over + " (times; above 1 is better)", group,
                      {speed_up("Throughput", "throughput.samples_per_sec", false), speed_up("Drained time", "drained_time_sec", true),
                       speed_up("Loop time", "loop_time_sec", true), speed_up("Mean save time", "checkpoint.mean_ms", true),
                       speed_up("Latency", "latency.mean_ms", true)});
    text += table("Restore of the last checkpoint", group,
                  {number("Time (ms)", "restore.time_ms"), number("Cold (GB/s)", "restore.gbps"),
                   number("From the page cache (GB/s)", "restore.warm_gbps"), exactness(), number("Set-up before the clock (s)", "setup_time_sec")});
    return text;
}

std::string provenance(std::vector<result_file> const& results) {
    std::string text;
    for (auto const* section : {"machine", "limits"}) {
        // The same machine is told once, however many results it wrote.
        std::vector<std::pair<json const*, std::vector<std::string>>> seen;
        for (auto const& result : results) {
            auto const* value = find_value(result.document, section);
            if (value == nullptr) continue;
            auto const same = std::find_if(seen.begin(), seen.end(), [&](auto const& s) { return *s.first == *value; });
            if (same == seen.end())
                seen.push_back({value, {result.file_name}});
            else
                same->second.push_back(result.file_name);
        }
        for (auto const& [value, files] : seen) {
            auto const what = section == std::string_view("machine") ? "Machine" : "Probe";
            auto const rows = object_table(*value, what, "Value");
            if (!rows.empty() && seen.size() > 1)
                text +=
                    "In " + markdown_text(files.front()) + (files.size() > 1 ? " and " + std::to_string(files.size() - 1) + " more" : "") + ":\n\n";
            text += rows;
        }
    }
    for (auto const& result : results) {
        text += "**" + markdown_text(result.file_name) + "**";
        if (auto const started = result.text("started"); !started.empty()) text += ", started " + markdown_text(started);
        if (auto const version = result.text("version"); !version.empty()) text += ", version " + markdown_text(version);
        text += "\n\n";
        if (auto const command = result.text("config.command"); !command.empty()) text += code_block(command);
        text += configuration(result);
    }
    return text;
}

}  // namespace varve::tool::reporting
