#include "report.hpp"

#include "report_data.hpp"
#include "report_gnuplot.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <ostream>
#include <stdexcept>
#include <system_error>

namespace varve::tool {

namespace {

namespace fs = std::filesystem;
using namespace reporting;

// Readers of the old file keep it whole until the new one is.
void write_file(fs::path const& path, std::string const& text) {
    auto temporary = path;
    temporary.replace_filename("." + path.filename().string() + ".tmp-" + std::to_string(::getpid()));
    std::error_code error;
    errno = 0;
    {
        std::ofstream stream(temporary, std::ios::binary | std::ios::trunc);
        stream.write(text.data(), static_cast<std::streamsize>(text.size()));
        stream.close();
        if (!stream) error = std::error_code(errno != 0 ? errno : EIO, std::system_category());
    }
    if (!error) fs::rename(temporary, path, error);
    if (error) {
        std::error_code ignored;
        fs::remove(temporary, ignored);
        throw std::runtime_error("cannot write '" + plain_text(path.string()) + "' (" + error.message() +
                                 "): give --output-file a file in a folder that can be written");
    }
}

void prepare_output(fs::path const& file) {
    auto const shown = "'" + plain_text(file.string()) + "'";
    std::error_code error;
    if (!file.has_filename() || fs::is_directory(file, error))
        throw std::runtime_error("output file " + shown + " is a folder: give --output-file a name such as report.md");
    if (auto const folder = file.parent_path(); !folder.empty() && !fs::is_directory(folder, error)) {
        fs::create_directories(folder, error);
        if (error)
            throw std::runtime_error("cannot create folder '" + plain_text(folder.string()) + "' (" + error.message() +
                                     "): give --output-file a folder that can be written");
    }
}

// A file name as the target of a Markdown link.
std::string link_target(std::string const& name) {
    constexpr std::string_view digits = "0123456789ABCDEF";
    std::string target;
    for (auto const c : name) {
        auto const byte = static_cast<unsigned char>(c);
        auto const plain =
            (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || std::string_view("-_.~").find(c) != std::string_view::npos;
        if (plain)
            target += c;
        else
            target += {'%', digits[byte >> 4U], digits[byte & 15U]};
    }
    return target;
}

// Findings as they read on a terminal.
std::string without_markdown(std::string const& markdown) {
    std::string plain;
    for (std::size_t i = 0; i < markdown.size(); ++i) {
        if (markdown.compare(i, 2, "**") == 0) {
            ++i;
        } else if (markdown.compare(i, 5, "&amp;") == 0) {
            plain += '&';
            i += 4;
        } else if (markdown[i] == '\\' && i + 1 < markdown.size()) {
            plain += markdown[++i];
        } else {
            plain += markdown[i];
        }
    }
    return plain;
}

bool has_method(std::vector<result_file> const& results, std::string_view name) {
    return std::any_of(results.begin(), results.end(), [&](auto const& result) { return result.method(name) != nullptr; });
}

std::string introduction(std::vector<result_file> const& results) {
    std::string text = "# What checkpoints cost\n\n" + std::to_string(results.size()) + (results.size() == 1 ? " result" : " results") +
                       " of `varve bench`. GB is 10^9 bytes.";
    if (has_method(results, traditional_name))
        text += " " + std::string(traditional_name) + " is torch.save as it is, and not durable: its clock stops " +
                "when the file is closed. Those of original and layerwise run on until no power cut can take it back.";
    return text + "\n\n";
}

std::string reading_aid() {
    return "*Drained time* runs to the last durable checkpoint, *loop time* to the end of the last step; *save time* "
           "is what the training thread spends on a checkpoint (waiting, copying, issuing), *latency* the time from "
           "its begin until it is durable. *Checkpoint overhead* is the save times' share of the drained time. The "
           "*floor* is what the training and the disk's best rate allow. p99 of fewer than 300 saves is little more "
           "than the longest one. Values of several repeats are medians, with the smallest and the largest behind.\n\n";
}

}  // namespace

int write_report(report_options const& options, std::ostream& out, std::ostream& err) {
    auto const results = load_results(options.input_dir, err);
    auto const groups = group_results(results);
    prepare_output(options.output_file);

    auto text = introduction(results);
    text += "## Findings\n\n";
    std::string told;
    for (auto const& group : groups) told += "### " + markdown_text(group.title) + "\n\n" + findings(group) + '\n';
    text += told;

    std::string pictures;
    std::vector<chart> charts;
    if (auto const gnuplot = find_gnuplot()) {
        std::size_t number = 0;
        auto const drawn = std::count_if(groups.begin(), groups.end(), [](auto const& group) { return !group.earlier; });
        try {
            for (auto const& group : groups) {
                if (group.earlier) continue;
                auto const prefix = drawn == 1 ? std::string("_") : "_" + std::to_string(++number) + "_";
                auto const made = draw_charts(group, prefix, *gnuplot);
                if (made.empty()) continue;
                pictures += "### " + markdown_text(group.title) + "\n\n";
                for (auto const& one : made)
                    pictures += "![" + markdown_text(one.title) + "](" + link_target(options.output_file.stem().string() + one.suffix) + ")\n\n";
                charts.insert(charts.end(), made.begin(), made.end());
            }
        } catch (std::runtime_error const& error) {
            charts.clear();
            pictures = "No charts: " + markdown_text(error.what()) + "\n\n";
            err << "no charts: " << error.what() << '\n';
        }
    } else {
        pictures = "No charts: gnuplot is not in PATH. With it (package gnuplot-nox), run `varve report` again.\n\n";
        err << "no charts: gnuplot is not in PATH (package gnuplot-nox)\n";
    }
    text += "## Tables\n\n" + reading_aid();
    for (auto const& group : groups) text += "### " + markdown_text(group.title) + "\n\n" + tables(group);
    text += "## Charts\n\n" + pictures + "## Machine and command\n\n" + provenance(results);
    while (text.size() > 1 && text[text.size() - 2] == '\n') text.pop_back();

    // The charts first: a report never points at one that is not there.
    for (auto const& one : charts) {
        auto path = options.output_file;
        write_file(path.replace_filename(options.output_file.stem().string() + one.suffix), one.svg);
    }
    write_file(options.output_file, text);

    for (std::size_t begin = 0; begin < told.size();) {
        auto const end = told.find('\n', begin);
        auto line = told.substr(begin, end - begin);
        if (line.starts_with("### ")) line.erase(0, 4);
        if (!line.empty()) out << without_markdown(line) << '\n';
        begin = end + 1;
    }
    out << "report: " << plain_text(options.output_file.string()) << '\n';
    return 0;
}

}  // namespace varve::tool
