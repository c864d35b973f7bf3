#include "report.hpp"

#include "report_data.hpp"
#include "report_gnuplot.hpp"

#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace {

namespace fs = std::filesystem;
using varve::tool::reporting::json;

// A folder that goes with the test.
struct folder {
    folder() {
        std::string name = (fs::temp_directory_path() / "varve-report-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
        path = name;
    }
    folder(folder const&) = delete;
    ~folder() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }

    void write(std::string const& name, std::string const& text) const {
        fs::create_directories((path / "in" / name).parent_path());
        std::ofstream(path / "in" / name) << text;
    }
    void write(std::string const& name, json const& document) const { write(name, document.dump()); }
    std::string read(std::string const& name) const {
        std::ifstream stream(path / name);
        return {std::istreambuf_iterator<char>(stream), {}};
    }
    std::size_t count(std::string const& name) const {
        std::size_t files = 0;
        for ([[maybe_unused]] auto const& entry : fs::directory_iterator(path / name)) ++files;
        return files;
    }

    fs::path path;
};

// PATH for as long as it lives.
struct search_path {
    explicit search_path(std::string const& value) : before(std::getenv("PATH")) { ::setenv("PATH", value.c_str(), 1); }
    search_path(search_path const&) = delete;
    ~search_path() { ::setenv("PATH", before.c_str(), 1); }
    std::string before;
};

json method(double drained_sec, double save_ms) {
    return {{"drained_time_sec", drained_sec},
            {"loop_time_sec", drained_sec},
            {"throughput", {{"samples_per_sec", 200 / drained_sec}}},
            {"memory", {{"peak_cpu_gb", 2.5}, {"peak_gpu_gb", 0}}},
            {"training_step", {{"mean_ms", 100.0}, {"std_ms", 2.0}}},
            {"final_loss", 6.912345678901234},
            {"overhead_vs_none_percent", 100 * (drained_sec / 10 - 1)},
            {"checkpoint", {{"mean_ms", save_ms}, {"std_ms", 1.0}, {"max_ms", save_ms}, {"count", 10}}},
            {"restore", {{"bit_exact", true}}}};
}

json none() {
    auto values = method(10, 0);
    for (auto const* key : {"checkpoint", "restore", "overhead_vs_none_percent"}) values.erase(key);
    return values;
}

json result(int every = 10) {
    return {{"results",
             {{"No Checkpoint", none()},
              {"Traditional PyTorch Checkpoint", method(20, 1000)},
              {"Original PCCheck", method(14, 200)},
              {"Layerwise PCCheck (Improved)", method(11, 50)}}},
            {"config",
             {{"command", "varve bench --scenario large"},
              {"model", {{"d_model", 1024}, {"num_layers", 12}}},
              {"training", {{"checkpoint_freq", every}, {"num_steps", 100}}},
              {"run", {{"scenario", "large"}}}}},
            {"machine", {{"cpu", "A CPU"}}},
            {"started", "2025-01-01T00:00:00Z"},
            {"version", "0.1.0"}};
}

json& layerwise(json& document) { return document["results"]["Layerwise PCCheck (Improved)"]; }
json& original(json& document) { return document["results"]["Original PCCheck"]; }

struct written {
    std::string text, out, err;
};

written report(folder const& home, std::string const& output = "out/report.md") {
    std::ostringstream out, err;
    BOOST_TEST(varve::tool::write_report({home.path / "in", home.path / output}, out, err) == 0);
    return {home.read(output), out.str(), err.str()};
}

bool holds(std::string const& text, std::string_view part) { return text.find(part) != std::string::npos; }

bool gnuplot_missing() {
    if (varve::tool::reporting::find_gnuplot()) return false;
    varve_test::skip("gnuplot is not in PATH");
    return true;
}

}  // namespace

BOOST_AUTO_TEST_CASE(findings_come_first_and_name_the_cheapest_method) {
    folder const home;
    home.write("comparison_1.json", result());
    auto const [text, out, err] = report(home);
    BOOST_TEST(holds(text, "**Layerwise PCCheck (Improved) costs least.**"));
    BOOST_TEST(holds(text, "50.0 ms with Layerwise PCCheck (Improved) (0.050 of it, 20 times less)"));
    BOOST_TEST(holds(text, "0.550 with Layerwise PCCheck (Improved)"));
    BOOST_TEST(holds(text, "to the bit: 6.912345678901234."));
    BOOST_TEST(holds(text, "Every restore was bit exact (3 of 3)."));
    BOOST_TEST(holds(text, "not durable"));
    BOOST_TEST(text.find("## Findings") < text.find("## Tables"));
    BOOST_TEST(text.find("## Tables") < text.find("## Charts"));
    BOOST_TEST(holds(text, "| Layerwise PCCheck (Improved) | 1.82 | 1.82 | 1.82 | 20.0 |"));
    BOOST_TEST(holds(text, "varve bench --scenario large"));
    BOOST_TEST(holds(text, "A CPU"));
    BOOST_TEST(holds(out, "- Layerwise PCCheck (Improved) costs least."));
    BOOST_TEST(holds(out, "report.md"));
    BOOST_TEST(!holds(text, "null"));
}

BOOST_AUTO_TEST_CASE(a_difference_below_the_scatter_of_one_run_is_called_noise) {
    folder const home;
    auto document = result();
    original(document)["drained_time_sec"] = 11.2;
    home.write("comparison_1.json", document);
    auto const text = report(home).text;
    BOOST_TEST(holds(text, "Layerwise PCCheck (Improved) and Original PCCheck cost least; the difference"));
    BOOST_TEST(holds(text, "below about 3% count as noise"));
}

BOOST_AUTO_TEST_CASE(repeats_are_paired_and_give_an_interval) {
    folder const home;
    auto document = result();
    for (auto* values :
         {&original(document), &layerwise(document), &document["results"]["No Checkpoint"], &document["results"]["Traditional PyTorch Checkpoint"]}) {
        auto const time = (*values)["drained_time_sec"].get<double>();
        // The machine slows down from repeat to repeat, for every method alike: pairs do not care.
        for (int i = 0; i < 7; ++i) (*values)["repeats"].push_back({{"drained_time_sec", time * (1 + 0.1 * i) * (i % 2 == 0 ? 1 : 1.001)}});
    }
    home.write("comparison_1.json", document);
    auto const text = report(home).text;
    BOOST_TEST(holds(text, "0.550 with Layerwise PCCheck (Improved) (95% interval 0.550 to 0.550, 7 repeats)"));
    BOOST_TEST(holds(text, "Medians of 7 repeats"));
    BOOST_TEST(holds(text, "11.0 (11.0 to 17.6)"));
}

BOOST_AUTO_TEST_CASE(two_repeats_that_disagree_prove_nothing) {
    folder const home;
    auto document = result();
    original(document)["repeats"] = {{{"drained_time_sec", 13.0}}, {{"drained_time_sec", 15.0}}};
    layerwise(document)["repeats"] = {{{"drained_time_sec", 12.5}}, {{"drained_time_sec", 11.0}}};
    home.write("comparison_1.json", document);
    BOOST_TEST(holds(report(home).text, "Layerwise PCCheck (Improved) and Original PCCheck cost least; the difference"));
}

BOOST_AUTO_TEST_CASE(what_is_wrong_is_said) {
    folder const home;
    auto document = result();
    original(document)["final_loss"] = 6.912345678901235;
    layerwise(document)["restore"]["bit_exact"] = false;
    layerwise(document)["skipped"] = 3;
    home.write("comparison_1.json", document);
    auto const text = report(home).text;
    BOOST_TEST(holds(text, "The final losses differ"));
    BOOST_TEST(holds(text, "Original PCCheck 6.912345678901235"));
    BOOST_TEST(holds(text, "Not bit exact after restore: Layerwise PCCheck (Improved)."));
    BOOST_TEST(holds(text, "Layerwise PCCheck (Improved): of its saves 3 skipped."));
}

BOOST_AUTO_TEST_CASE(files_that_differ_in_the_frequency_alone_are_one_sweep) {
    folder const home;
    for (auto const every : {50, 5, 10}) home.write("comparison_1_freq" + std::to_string(every) + ".json", result(every));
    auto const text = report(home).text;
    BOOST_TEST(holds(text, "every 5, 10, 50 steps"));
    BOOST_TEST(holds(text, "costs least at every frequency"));
    BOOST_TEST(holds(text, "| Layerwise PCCheck (Improved) | 50 | 18.2 |"));
    if (gnuplot_missing()) return;
    BOOST_TEST(holds(home.read("out/report_overhead.svg"), "steps between checkpoints"));
    BOOST_TEST(home.count("out") == 5U);
}

BOOST_AUTO_TEST_CASE(charts_stand_beside_the_report_and_carry_values) {
    if (gnuplot_missing()) return;
    folder const home;
    home.write("comparison_1.json", result());
    auto const text = report(home, "out/my report (1).md").text;
    for (auto const* name : {"throughput", "overhead", "save_time", "memory"}) {
        BOOST_TEST(holds(text, "](my%20report%20%281%29_" + std::string(name) + ".svg)"));
        BOOST_TEST(holds(home.read("out/my report (1)_" + std::string(name) + ".svg"), "layerwise"));
    }
    BOOST_TEST(holds(home.read("out/my report (1)_save_time.svg"), "1000 ms"));
    BOOST_TEST(home.count("out") == 5U);  // no temporary file is left
}

BOOST_AUTO_TEST_CASE(without_gnuplot_the_tables_stand_alone) {
    folder const home;
    home.write("comparison_1.json", result());
    search_path const nothing(home.path.string());
    auto const [text, out, err] = report(home);
    BOOST_TEST(holds(text, "No charts: gnuplot is not in PATH"));
    BOOST_TEST(holds(text, "| Layerwise PCCheck (Improved) |"));
    BOOST_TEST(holds(err, "gnuplot"));
    BOOST_TEST(home.count("out") == 1U);
}

BOOST_AUTO_TEST_CASE(a_gnuplot_that_fails_leaves_the_tables) {
    folder const home;
    home.write("comparison_1.json", result());
    home.write("gnuplot", std::string("#!/bin/sh\necho broken >&2\nexit 3\n"));
    fs::permissions(home.path / "in/gnuplot", fs::perms::owner_all);
    search_path const broken((home.path / "in").string());
    auto const text = report(home).text;
    BOOST_TEST(holds(text, "No charts: "));
    BOOST_TEST(holds(text, "broken"));
}

BOOST_AUTO_TEST_CASE(names_in_a_result_run_no_commands_and_add_no_markup) {
    folder const home;
    auto document = result();
    auto const mark = (home.path / "owned").string();
    document["results"]["a'\n!touch " + mark + "\n\"`touch " + mark + "`| *b* <img src=x>"] = method(12, 60);
    document["config"]["run"]["scenario"] = "s'\nsystem('touch " + mark + "')\n# @x";
    document["config"]["command"] = "varve ```\n# heading";
    home.write("comparison_1.json", document);
    auto const text = report(home).text;
    BOOST_TEST(!fs::exists(mark));
    BOOST_TEST(!holds(text, " <img"));
    BOOST_TEST(!holds(text, "\n# heading"));
    BOOST_TEST(holds(text, "\\| \\*b\\* \\<img src=x\\>"));
    BOOST_TEST(holds(text, "````sh\n"));
}

BOOST_AUTO_TEST_CASE(files_that_are_no_results_are_skipped) {
    folder const home;
    home.write("comparison_1.json", result());
    home.write("broken.json", std::string("{\"results\": {"));
    home.write("probe.json", std::string("{\"direct\": {}}"));
    home.write("deep.json", std::string(100000, '['));
    home.write("nested.json", "{\"results\": {\"X\": {\"a\": " + std::string(1000, '[') + std::string(1000, ']') + "}}}");
    home.write("below/comparison_2.json", result(5));
    home.write("notes.txt", std::string("no"));
    auto const [text, out, err] = report(home);
    BOOST_TEST(holds(err, "broken.json: malformed"));
    BOOST_TEST(holds(err, "probe.json: no results"));
    BOOST_TEST(holds(err, "deep.json: too deep"));
    BOOST_TEST(holds(err, "nested.json: too deep"));
    BOOST_TEST(!holds(err, "notes.txt"));
    BOOST_TEST(holds(text, "1 result of"));
}

BOOST_AUTO_TEST_CASE(a_result_may_lack_anything) {
    folder const home;
    home.write("a.json", std::string(R"({"results": {"No Checkpoint": {}, "X": {}}})"));
    home.write("b.json", std::string(R"({"results": {"X": {"drained_time_sec": 0, "checkpoint": 3, "repeats": {}}}})"));
    home.write("c.json", std::string(R"({"results": {"X": {"repeats": [1, null], "final_loss": "x"}}, "config": [],
                                         "machine": null, "started": 7})"));
    auto document = result();
    for (auto& [name, values] : document["results"].items()) values.erase("drained_time_sec");
    home.write("d.json", document);
    auto const text = report(home).text;
    BOOST_TEST(holds(text, "4 results of"));
    BOOST_TEST(!holds(text, "nan"));
    BOOST_TEST(!holds(text, "inf "));
}

BOOST_AUTO_TEST_CASE(without_results_the_error_says_what_to_do) {
    folder const home;
    std::ostringstream out, err;
    auto const message = [&](fs::path const& input, fs::path const& output) {
        try {
            varve::tool::write_report({input, output}, out, err);
        } catch (std::runtime_error const& error) {
            return std::string(error.what());
        }
        return std::string("none");
    };
    fs::create_directory(home.path / "empty");
    BOOST_TEST(holds(message(home.path / "missing", home.path / "r.md"), "--input-dir"));
    BOOST_TEST(holds(message(home.path / "empty", home.path / "r.md"), "run varve bench"));
    home.write("comparison_1.json", result());
    BOOST_TEST(holds(message(home.path / "in", home.path / "empty"), "is a folder"));
    BOOST_TEST(holds(message(home.path / "in", home.path / "in/comparison_1.json/r.md"), "--output-file"));
    BOOST_TEST(!fs::exists(home.path / "r.md"));
}

BOOST_AUTO_TEST_CASE(numbers_have_the_digits_that_matter) {
    using varve::tool::reporting::format_number;
    BOOST_TEST(format_number(1234.5) == "1234");
    BOOST_TEST(format_number(123.45) == "123");
    BOOST_TEST(format_number(12.345) == "12.3");
    BOOST_TEST(format_number(9.996) == "10.0");
    BOOST_TEST(format_number(0.05183) == "0.0518");
    BOOST_TEST(format_number(-0.3, 1) == "-0.3");
    BOOST_TEST(format_number(0) == "0");
    BOOST_TEST(format_number(100, 9) == "100");
    BOOST_TEST(format_number(1e300).size() == 301U);
}
