#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <csignal>
#include <random>

#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

/// A run that is killed again and again: what it trains with, and for how long.
struct victim {
    std::string method, device, steps;
};

std::vector<std::string> train_args(victim const& v, temporary_folder const& folder, std::string const& name) {
    return joined({"train", "--method", v.method, "--device", v.device, "--dir", folder / name, "--events", folder / (name + ".events"),
                   "--num-steps", v.steps},
                  tiny_model({"--checkpoint-freq", "3"}));
}

/// Every checkpoint that was reported durable is there or has a newer one.
void durable_is_kept(temporary_folder const& folder, std::string const& name) {
    if (!std::filesystem::exists(folder / (name + ".events"))) return;
    auto const durable = largest(steps_of(folder / (name + ".events"), "durable"));
    if (durable == 0) return;
    auto const steps = stored_steps(folder / name);
    BOOST_TEST_REQUIRE(!steps.empty());
    BOOST_TEST(steps.back() >= durable);
}

std::uintmax_t size_of(std::filesystem::path const& file) {
    std::error_code code;
    auto const size = std::filesystem::file_size(file, code);
    return code ? 0 : size;
}

/// Trained to its end, the run that was killed has the losses and the tensors of the one that never was.
void ends_like_the_whole_run(victim const& v, temporary_folder const& folder, std::string const& name) {
    auto const last = run_tool(train_args(v, folder, name));
    BOOST_TEST_REQUIRE(last.code == 0, last.err);
    BOOST_TEST((losses_in(folder / (name + ".events")) == losses_in(folder / "whole.events")));
    auto const compared = run_tool({"diff", newest_file(folder / "whole"), newest_file(folder / name)});
    BOOST_TEST(compared.code == 0, compared.out << compared.err);
    expect_whole(folder / name);
}

void kill_and_go_on(victim const& v) {
    auto const kills = full() ? 20 : 3;
    temporary_folder folder;
    BOOST_TEST_REQUIRE(run_tool(train_args(v, folder, "whole")).code == 0);

    std::mt19937 random(std::random_device{}());
    auto between = [&](int low, int high) { return std::chrono::milliseconds(std::uniform_int_distribution<>(low, high)(random)); };
    // A run that comes to its end before it was killed often enough is followed by another, in a store of its own.
    for (int killed = 0, round = 0; killed < kills; ++round) {
        auto const name = "killed" + std::to_string(round), events = name + ".events";
        for (bool done = false; killed < kills && !done;) {
            auto const before = size_of(folder / events);
            running_tool run(train_args(v, folder, name));
            // A quarter of the kills at any moment, the start included; the others once it trains, so that it gets on.
            if (between(1, 4) == std::chrono::milliseconds(1)) {
                done = run.ends_within(between(0, 1500));
            } else {
                while (!done && size_of(folder / events) == before) done = run.ends_within(std::chrono::milliseconds(2));
                done = done || run.ends_within(between(0, 400));
            }
            if (done) {
                auto const ended = run.wait();
                BOOST_TEST(ended.code == 0, ended.err);
            } else {
                run.signal(SIGKILL);
                run.wait();
                ++killed;
            }
            durable_is_kept(folder, name);
        }
        ends_like_the_whole_run(v, folder, name);
        BOOST_TEST_REQUIRE(round < 100);
    }
}

void kill_on_the_cpu(std::string const& method) { kill_and_go_on({method, "cpu", full() ? "600" : "60"}); }

/// A step takes a few milliseconds there.
void kill_on_the_gpu(std::string const& method) {
    if (have_tool_gpu()) kill_and_go_on({method, "cuda", full() ? "6000" : "600"});
}

}  // namespace

BOOST_AUTO_TEST_CASE(traditional_survives_kills) { kill_on_the_cpu("traditional"); }
BOOST_AUTO_TEST_CASE(original_survives_kills) { kill_on_the_cpu("original"); }
BOOST_AUTO_TEST_CASE(layerwise_survives_kills) { kill_on_the_cpu("layerwise"); }
BOOST_AUTO_TEST_CASE(combinations_with_asio_survive_kills) {
    if (!runs_here("host+async+asio")) return skip("no Boost.Asio files here");
    for (auto const* method : {"host+async+asio", "host+layerwise+asio"}) kill_on_the_cpu(method);
}

BOOST_AUTO_TEST_CASE(traditional_survives_kills_on_a_gpu) { kill_on_the_gpu("traditional"); }
BOOST_AUTO_TEST_CASE(original_survives_kills_on_a_gpu) { kill_on_the_gpu("original"); }
BOOST_AUTO_TEST_CASE(layerwise_survives_kills_on_a_gpu) { kill_on_the_gpu("layerwise"); }

}  // namespace varve_test
