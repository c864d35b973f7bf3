#include "report_data.hpp"
#include "report_gnuplot.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

namespace varve::tool::reporting {

namespace {

constexpr double width = 700;
constexpr double char_width = 8.2;  // of the 14 px font, on average: SVG viewers bring their own
constexpr std::string_view ink = "#22303c", faint = "#5b6875", grid = "#e3e7eb";

struct measure {
    std::string slug, title, path, unit;
    bool with_none;
};

std::vector<measure> measures(result_group const& group) {
    auto const any = [&](std::string_view path) {
        return std::any_of(group.files.begin(), group.files.end(), [&](auto const* file) {
            return std::any_of(file->methods.begin(), file->methods.end(), [&](auto const& method) { return method.number(path).value_or(0) > 0; });
        });
    };
    auto const against_none = std::any_of(group.files.begin(), group.files.end(), [](auto const* file) {
        return std::any_of(file->methods.begin(), file->methods.end(),
                           [](auto const& m) { return m.number("overhead_vs_none_percent").has_value(); });
    });
    std::vector<measure> list{
        {"throughput", "Throughput in samples/s (more is better)", "throughput.samples_per_sec", "", true},
        against_none
            ? measure{"overhead", "Overhead over training without checkpoints, in % (less is better)", "overhead_vs_none_percent", " %", false}
            : measure{"overhead", "Time spent on checkpoints, in % of the run (less is better)", "checkpoint_overhead_percent", " %", false},
        {"save_time", "Mean save time in ms: how long training is blocked (less is better)", "checkpoint.mean_ms", " ms", false},
        {"memory", "Peak memory in GB (less is better)", "memory.peak_cpu_gb", " GB", true},
    };
    if (any("memory.peak_gpu_gb")) list.push_back({"gpu_memory", "Peak GPU memory in GB (less is better)", "memory.peak_gpu_gb", " GB", true});
    return list;
}

std::string pixels(double value) { return format_number(value, 6); }

// Gnuplot reads numbers in the C locale, in as many digits as a chart can show.
std::string coordinate(double value) { return json(value).dump(); }

std::string label(std::string const& text, std::string const& where, std::string_view align, std::string_view colour,
                  std::string_view font = "sans-serif,14") {
    return "set label " + gnuplot_string(text) + " at " + where + " " + std::string(align) + " front font '" + std::string(font) +
           "' textcolor rgb '" + std::string(colour) + "'\n";
}

std::string head(measure const& what, std::string const& subtitle, double height) {
    auto const at = [&](double y) { return "screen " + pixels(16 / width) + ", screen " + pixels(1 - y / height); };
    return "set encoding utf8\nset terminal svg size " + pixels(width) + "," + pixels(height) +
           " dynamic noenhanced font 'sans-serif,14' background rgb '#ffffff'\n"
           "unset key\nset border 0\nunset xtics\nunset ytics\n" +
           label(what.title, at(24), "left", ink, "sans-serif:Bold,16") +
           (subtitle.empty() ? "" : label(subtitle, at(46), "left", faint, "sans-serif,13"));
}

std::string shortened(std::string const& text, std::size_t most) {
    // Counts characters, not bytes, and never cuts one in two.
    std::size_t characters = 0;
    for (std::size_t i = 0; i < text.size(); ++i)
        if ((static_cast<unsigned char>(text[i]) & 0xc0U) != 0x80U && ++characters > most) return text.substr(0, i) + "…";
    return text;
}

std::size_t length(std::string const& text) {
    auto const starts = [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; };
    return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), starts));
}

std::string margins(double left, double right, double top, double bottom, double height) {
    return "set lmargin at screen " + pixels(left / width) + "\nset rmargin at screen " + pixels(1 - right / width) + "\nset tmargin at screen " +
           pixels(1 - top / height) + "\nset bmargin at screen " + pixels(bottom / height) + '\n';
}

struct bar {
    std::string name, colour, text;
    double value, low, high;
};

// Horizontal bars with their values at the end; a thin line spans the repeats.
std::string bar_script(measure const& what, std::string subtitle, std::vector<bar> const& bars) {
    constexpr double row = 38, top = 62, bottom = 14;
    auto const height = top + row * static_cast<double>(bars.size()) + bottom;
    std::size_t longest_name = 1, longest_text = 1;
    double largest = 0, smallest = 0;
    bool spread = false;
    for (auto const& b : bars) {
        longest_name = std::max(longest_name, length(b.name));
        longest_text = std::max(longest_text, length(b.text));
        largest = std::max({largest, b.value, b.high});
        smallest = std::min({smallest, b.value, b.low});
        spread = spread || b.high > b.low;
    }
    if (spread) subtitle = shortened(subtitle, 70) + " · line: range over repeats";
    if (largest <= smallest) largest = smallest + 1;
    auto const left = 24 + char_width * static_cast<double>(longest_name);
    auto const room = 14 + char_width * static_cast<double>(longest_text);
    auto const scale = (width - left - 16 - room) / (largest - smallest);
    auto script = head(what, subtitle, height);
    script += margins(left, 16, top, bottom, height) + "set xrange [" + coordinate(smallest) + ":" + coordinate(largest + room / scale) +
              "]\nset yrange [0:" + std::to_string(bars.size()) + "]\n";
    for (std::size_t i = 0; i < bars.size(); ++i) {
        auto const& b = bars[i];
        auto const middle = static_cast<double>(bars.size() - i) - 0.5;
        script += "set object rectangle from " + coordinate(std::min(0.0, b.value)) + "," + coordinate(middle - 0.33) + " to " +
                  coordinate(std::max(0.0, b.value)) + "," + coordinate(middle + 0.33) + " front fillcolor rgb '" + b.colour +
                  "' fillstyle solid 1 noborder\n";
        if (b.high > b.low)
            script += "set arrow from " + coordinate(b.low) + "," + coordinate(middle) + " to " + coordinate(b.high) + "," + coordinate(middle) +
                      " nohead front linewidth 1.5 linecolor rgb '" + std::string(ink) + "'\n";
        auto const y = ", first " + coordinate(middle);
        script += label(b.name, "screen " + pixels((left - 10) / width) + y, "right", ink);
        script += label(b.text, "first " + coordinate(std::max({0.0, b.value, b.high}) + 7 / scale) + y, "left", ink);
    }
    // The zero line carries the bars.
    script +=
        "set arrow from 0,0 to 0," + std::to_string(bars.size()) + " nohead front linewidth 1 linecolor rgb '" + std::string(faint) + "'\nplot NaN\n";
    return script;
}

struct point {
    double every, value;
};

struct series {
    std::string name, colour;
    std::vector<point> points;
};

// Lines over the frequency, on a logarithmic axis, each named at its right end.
std::string line_script(measure const& what, std::string const& subtitle, std::vector<series> const& lines) {
    constexpr double height = 390, top = 72, bottom = 66, left = 64;
    std::set<double> frequencies;
    std::size_t longest = 1;
    double largest = 0, smallest = 0;
    for (auto const& line : lines) {
        longest = std::max(longest, length(line.name));
        for (auto const& p : line.points) {
            frequencies.insert(p.every);
            largest = std::max(largest, p.value);
            smallest = std::min(smallest, p.value);
        }
    }
    if (largest <= smallest) largest = smallest + 1;
    // About five round steps, the range ending on one, so that every line lies between two ticks.
    auto const magnitude = std::pow(10.0, std::floor(std::log10((largest - smallest) / 5)));
    auto const parts = (largest - smallest) / 5 / magnitude;
    auto const tick = magnitude * (parts <= 1 ? 1 : parts <= 2 ? 2 : parts <= 5 ? 5 : 10);
    auto const low = std::floor(smallest / tick) * tick, high = (std::floor(largest / tick) + 1) * tick;
    auto const right = 26 + char_width * static_cast<double>(longest);
    auto const per_pixel = (high - low) / (height - top - bottom);
    auto const first = std::log10(*frequencies.begin()), last = std::log10(*frequencies.rbegin());
    auto const margin = 0.05 * (last - first);
    auto script = head(what, subtitle, height);
    script += margins(left, right, top, bottom, height) + "set xrange [" + coordinate(first - margin) + ":" + coordinate(last + margin) +
              "]\nset yrange [" + coordinate(low) + ":" + coordinate(high) + "]\n";
    script += "set grid ytics back linetype 1 linewidth 1 linecolor rgb '" + std::string(grid) + "'\n" + "set ytics " + coordinate(tick) +
              " scale 0 format '%g' textcolor rgb '" + std::string(faint) + "'\n";
    std::string tics;
    for (auto const every : frequencies) tics += (tics.empty() ? "" : ", ") + ("'" + format_number(every, 9) + "' " + coordinate(std::log10(every)));
    script += "set xtics scale 0 (" + tics + ") textcolor rgb '" + std::string(faint) +
              "'\nset xlabel 'steps between checkpoints' offset 0,0.4 textcolor rgb '" + std::string(faint) +
              "'\nset arrow from graph 0, first 0 to graph 1, first 0 nohead back linewidth 1 linecolor rgb '" + std::string(faint) + "'\n";

    // Names at the right ends, pushed apart until none covers another.
    std::vector<std::pair<double, series const*>> ends;
    for (auto const& line : lines) ends.emplace_back(line.points.back().value, &line);
    std::sort(ends.begin(), ends.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
    auto const apart = 17 * per_pixel;
    for (std::size_t i = 1; i < ends.size(); ++i) ends[i].first = std::max(ends[i].first, ends[i - 1].first + apart);
    for (auto const& [y, line] : ends) script += label(line->name, "graph 1, first " + coordinate(y), "left offset character 1,0", line->colour);

    // Values at the points: the upper of two lines has them above, the lower below; more lines would cover them.
    auto const per_pixel_x = (last - first + 2 * margin) / (width - left - right);
    for (auto const& line : lines) {
        if (lines.size() > 2) break;
        for (std::size_t i = 0; i < line.points.size(); ++i) {
            auto const& p = line.points[i];
            bool below = false;
            for (auto const& other : lines)
                for (auto const& q : other.points)
                    below = below || (&other != &line && q.every == p.every && (q.value > p.value || (q.value == p.value && &other < &line)));
            below = below && (p.value - low) / per_pixel > 24;
            // A line that climbs or falls would cross its own values: they step aside.
            auto const before = line.points[i > 0 ? i - 1 : i].value;
            auto const after = line.points[i + 1 < line.points.size() ? i + 1 : i].value;
            auto const climb = (after - before) / per_pixel;
            auto const aside = std::abs(climb) < 12 ? 0.0 : (climb < 0) != below ? 12.0 : -12.0;
            script += label(
                format_number(p.value),
                "first " + coordinate(std::log10(p.every) + aside * per_pixel_x) + ", first " + coordinate(p.value + (below ? -15 : 14) * per_pixel),
                "center", ink, "sans-serif,12");
        }
    }

    std::string plot;
    for (std::size_t i = 0; i < lines.size(); ++i) {
        auto const block = "$line" + std::to_string(i);
        script += block + " << END\n";
        for (auto const& p : lines[i].points) script += coordinate(std::log10(p.every)) + " " + coordinate(p.value) + '\n';
        script += "END\n";
        plot += (plot.empty() ? "plot " : ", ") + block + " using 1:2 with linespoints linewidth 2.5 pointtype 7 " + "pointsize 0.7 linecolor rgb '" +
                lines[i].colour + "'";
    }
    return script + plot + '\n';
}

std::vector<bar> bars_of(result_file const& file, measure const& what) {
    std::vector<bar> bars;
    for (auto const& method : file.methods) {
        auto const value = method.number(what.path);
        if (!value || (!what.with_none && method.name == none_name)) continue;
        auto const repeats = method.repeats(what.path);
        auto const ends = std::minmax_element(repeats.begin(), repeats.end());
        bars.push_back({shortened(method.label, 30), method.colour, format_number(*value) + what.unit, *value, repeats.empty() ? *value : *ends.first,
                        repeats.empty() ? *value : *ends.second});
    }
    return bars;
}

std::vector<series> lines_of(result_group const& group, measure const& what) {
    std::vector<series> lines;
    for (auto const* file : group.files)
        for (auto const& method : file->methods) {
            auto const value = method.number(what.path);
            auto const every = file->checkpoint_freq();
            if (!value || !every || *every <= 0 || (!what.with_none && method.name == none_name)) continue;
            auto const name = shortened(method.label, 24);
            auto found =
                std::find_if(lines.begin(), lines.end(), [&](series const& line) { return line.name == name && line.colour == method.colour; });
            if (found == lines.end()) found = lines.insert(lines.end(), {name, method.colour, {}});
            found->points.push_back({*every, *value});
        }
    std::erase_if(lines, [](series const& line) { return line.points.size() < 2; });
    return lines;
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
    for (auto at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) text.replace(at, from.size(), to);
}

// gnuplot 5 writes a bold face into the family's name, where no viewer finds it, and calls every drawing the same.
std::string finished(std::string svg, std::string const& title) {
    replace_all(svg, "font-family=\"sans-serif:Bold\"", "font-family=\"sans-serif\" font-weight=\"bold\"");
    replace_all(svg, "<title>Gnuplot</title>", "<title>" + title + "</title>");
    return svg;
}

}  // namespace

std::vector<chart> draw_charts(result_group const& group, std::string const& prefix, std::filesystem::path const& gnuplot) {
    std::vector<chart> charts;
    constexpr std::string_view prefix_word = "Scenario ";
    auto const subtitle = shortened(group.title.starts_with(prefix_word) ? group.title.substr(prefix_word.size()) : group.title, 92);
    auto const draw = [&](measure const& what, std::string const& script) {
        charts.push_back({prefix + what.slug + ".svg", what.title, finished(run_gnuplot(gnuplot, script), what.title)});
    };
    for (auto const& what : measures(group)) {
        if (auto const lines = lines_of(group, what); !lines.empty())
            draw(what, line_script(what, subtitle, lines));
        else if (auto const bars = bars_of(*group.files.front(), what); !bars.empty() && !group.swept())
            draw(what, bar_script(what, subtitle, bars));
    }
    return charts;
}

}  // namespace varve::tool::reporting
