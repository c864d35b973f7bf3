#include <boost/test/unit_test.hpp>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "shell.hpp"
#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

std::vector<std::string> methods(std::string const& device) {
    std::vector<std::string> names{"traditional", "original", "layerwise"};
    auto const with_asio = std::string(device == "cuda" ? "pinned" : "host") + "+async+asio";
    if (runs_here(with_asio, device)) names.push_back(with_asio);
    return names;
}

std::vector<std::string> train_args(std::string const& method, std::string const& dir, std::string const& steps,
                                    std::vector<std::string> const& more = {}) {
    return joined(joined({"train", "--method", method, "--dir", dir, "--num-steps", steps}, tiny_model({"--checkpoint-freq", "4"})), more);
}

void trains(std::vector<std::string> const& args) {
    auto const r = run_tool(args);
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
}

void same_bits(std::string const& a, std::string const& b) {
    auto const r = run_tool({"diff", a, b});
    BOOST_TEST(r.code == 0, a << " and " << b << ": " << r.out << r.err);
}

/// A run, and one that is stopped and goes on, by every method.
void two_halves_are_one_run(std::string const& device) {
    for (auto const& method : methods(device)) {
        BOOST_TEST_CONTEXT(method) {
            temporary_folder folder;
            auto args = [&](std::string const& name, std::string const& steps) {
                return train_args(method, folder / name, steps, {"--events", folder / (name + ".events"), "--device", device});
            };
            trains(args("one", "11"));
            trains(args("two", "6"));
            trains(args("two", "11"));
            same_bits(newest_file(folder / "one"), newest_file(folder / "two"));
            BOOST_TEST((losses_in(folder / "one.events") == losses_in(folder / "two.events")));
        }
    }
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_line_of_events_that_a_kill_has_torn_spoils_no_other) {
    temporary_folder folder;
    auto const events = folder / "events";
    std::ofstream(events) << R"({"event": "durable", "method": "layer)";
    trains(train_args("layerwise", folder / "store", "4", {"--events", events}));
    std::ifstream in(events);
    std::string torn;
    std::getline(in, torn);
    BOOST_TEST(torn == R"({"event": "durable", "method": "layer)");
    std::size_t whole = 0;
    for (std::string line; std::getline(in, line); ++whole) BOOST_TEST(nlohmann::json::accept(line), line);
    BOOST_TEST(whole > 4u);
    BOOST_TEST(read_events(events).size() == whole);
}

BOOST_AUTO_TEST_CASE(what_is_printed_goes_into_no_file_of_a_store_where_nobody_listens) {
    temporary_folder folder;
    std::string command = "'" + std::string(std::getenv("VARVE_TOOL")) + "'";
    for (auto const& word : train_args("original", folder / "store", "4")) command += " '" + word + "'";
    BOOST_TEST(shell(command + " --device cpu <&- >&- 2>&-") == 0);
    expect_whole(folder / "store");
}

BOOST_AUTO_TEST_CASE(a_run_in_two_halves_ends_with_the_bits_of_one_run) { two_halves_are_one_run("cpu"); }
BOOST_AUTO_TEST_CASE(a_run_in_two_halves_ends_with_the_bits_of_one_run_on_a_gpu) {
    if (have_tool_gpu()) two_halves_are_one_run("cuda");
}

BOOST_AUTO_TEST_CASE(with_nothing_left_to_do_it_says_so) {
    temporary_folder folder;
    trains(train_args("layerwise", folder / "run", "5"));
    auto const r = run_tool(train_args("layerwise", folder / "run", "5"));
    BOOST_TEST(r.code == 0);
    BOOST_TEST(r.out.find("nothing left to do") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(going_back_makes_the_new_line_the_newest) {
    temporary_folder folder;
    auto const dir = folder / "run";
    trains(train_args("layerwise", dir, "12", {"--keep", "5"}));
    auto const whole_run = folder / "whole.safetensors";
    std::filesystem::copy_file(newest_file(dir), whole_run);
    // From step 4 to step 6: step 6 is now newer than 12, and a restart goes on from it, to the same bits again.
    trains(train_args("layerwise", dir, "6", {"--keep", "5", "--from-step", "4"}));
    auto const r = run_tool(train_args("layerwise", dir, "12", {"--keep", "5"}));
    BOOST_TEST(r.code == 0);
    BOOST_TEST(r.err.find("goes on from") != std::string::npos);
    BOOST_TEST(r.err.find("step-000000000006") != std::string::npos, r.err);
    same_bits(whole_run, newest_file(dir));
}

BOOST_AUTO_TEST_CASE(another_run_in_the_store_is_refused_in_one_line) {
    temporary_folder folder;
    auto const dir = folder / "run";
    trains(train_args("layerwise", dir, "5"));
    for (std::vector<std::string> const& other : {std::vector<std::string>{"--seed", "1"}, {"--lr", "0.01"}, {"--dropout", "0.2"}}) {
        auto const r = run_tool(train_args("layerwise", dir, "9", other));
        BOOST_TEST(r.code == 1);
        BOOST_TEST(line_count(r.err) == 1u, r.err);
        BOOST_TEST(r.err.find(other[0]) != std::string::npos, r.err);
    }
    auto model = train_args("layerwise", dir, "9");
    *(std::find(model.begin(), model.end(), "--vocab-size") + 1) = "999";
    for (auto const& args : {model, train_args("traditional", dir, "9"), train_args("layerwise", dir, "9", {"--fresh"})}) {
        auto const r = run_tool(args);
        BOOST_TEST(r.code == 1);
        BOOST_TEST(line_count(r.err) == 1u, r.err);
    }
    BOOST_TEST(stored_steps(dir) == (std::vector<std::uint64_t>{4, 5}), boost::test_tools::per_element());
    trains(train_args("layerwise", dir, "9", {"--fresh", "--overwrite", "--seed", "1"}));
    BOOST_TEST(stored_steps(dir) == (std::vector<std::uint64_t>{8, 9}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_stopped_run_saves_its_step_and_goes_on_from_it) {
    for (int signal : {SIGINT, SIGTERM}) {
        temporary_folder folder;
        auto const dir = folder / "run";
        running_tool run(joined({"train", "--method", "layerwise", "--dir", dir, "--events", folder / "events", "--num-steps", "100000"},
                                tiny_model({"--checkpoint-freq", "100000"})));
        BOOST_TEST_REQUIRE(run.comes_to_write_events(folder / "events"));
        run.signal(signal);
        BOOST_TEST_REQUIRE(run.ends_within(std::chrono::seconds(60)));
        auto const stopped = run.wait();
        BOOST_TEST(stopped.code == 130, stopped.err);
        auto const steps = stored_steps(dir);
        BOOST_TEST_REQUIRE(steps.size() == 1u);
        auto const last_step = largest(steps_of(folder / "events", "step"));
        BOOST_TEST(steps.back() == last_step);
        trains(train_args("layerwise", dir, std::to_string(last_step + 2)));
        trains(train_args("layerwise", folder / "never stopped", std::to_string(last_step + 2)));
        same_bits(newest_file(dir), newest_file(folder / "never stopped"));
    }
}

}  // namespace varve_test
