#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <functional>
#include <map>

#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

// 126 MB of state on a step of a few milliseconds: many blocks, few computations.
std::vector<std::string> large_state(std::string const& command, std::vector<std::string> const& more) {
    return joined({command, "--d-model",         "256", "--num-layers",      "2",  "--nhead",   "4", "--vocab-size",
                   "20000", "--dim-feedforward", "256", "--num-samples",     "10", "--seq-len", "8", "--batch-size",
                   "1",     "--num-steps",       "4",   "--checkpoint-freq", "2"},
                  more);
}

/// Whether, in every save, the first write was under way before the last layer was updated.
bool writes_before_the_last_update(std::filesystem::path const& events, std::string const& method) {
    std::map<std::uint64_t, std::int64_t> first_write, last_update;
    for (auto const& e : read_events(events)) {
        if (e.at("method") != method) continue;
        std::uint64_t const step = e.at("step");
        std::int64_t const time = e.at("time_ns");
        if (e.at("event") == "write") first_write.emplace(step, time);
        // Layer `run` is no optimizer's: it is taken when the save is sealed.
        if (e.at("event") == "layer_ready" && e.at("layer") != "run") last_update[step] = std::max(last_update[step], time);
    }
    BOOST_TEST(last_update.size() == 2u);
    bool before = true;
    for (auto const& [step, time] : last_update) {
        BOOST_TEST_REQUIRE(first_write.count(step) == 1u);
        before = before && first_write[step] < time;
    }
    return before;
}

/// Runs the command until its saves overlapped with the updates. A machine that has other work to do may let the threads that
/// write wait for as long as an update takes: that it happens within some runs is what varve promises.
void overlaps(std::string const& method, std::function<outcome(temporary_folder const&)> const& run) {
    for (int attempt = 1; attempt <= 5; ++attempt) {
        temporary_folder folder;
        auto const r = run(folder);
        BOOST_TEST_REQUIRE(r.code == 0, r.err);
        if (writes_before_the_last_update(folder / "events", method)) return;
        BOOST_TEST_MESSAGE("attempt " << attempt << " did not overlap");
    }
    BOOST_ERROR("in none of 5 runs was a block of each save written before the last update");
}

}  // namespace

BOOST_AUTO_TEST_CASE(layerwise_writes_before_the_last_layer_is_updated) {
    for (std::string const method : {"layerwise", "host+layerwise+posix"})
        overlaps(method, [&](auto const& folder) {
            return run_tool(large_state("train", {"--method", method, "--dir", folder / "run", "--events", folder / "events"}));
        });
}

BOOST_AUTO_TEST_CASE(layers_that_are_updated_in_groups_are_written_before_the_last_group_too) {
    for (std::string const update : {"foreach", "fused"}) {
        if (!has_update(update)) {
            skip("this LibTorch has no " + update + " update");
            continue;
        }
        overlaps("layerwise", [&](auto const& folder) {
            return run_tool(
                large_state("train", {"--method", "layerwise", "--dir", folder / "run", "--events", folder / "events", "--update", update}));
        });
    }
}

BOOST_AUTO_TEST_CASE(it_overlaps_with_a_pool_smaller_than_the_image_and_stays_inside_it) {
    overlaps("layerwise", [](auto const& folder) {
        auto const r = run_tool(large_state("bench", {"--methods", "layerwise", "--output-dir", folder.path().string(), "--events", folder / "events",
                                                      "--pool-size-mb", "40", "--warmup", "1"}));
        for (auto const& entry : std::filesystem::directory_iterator(folder.path())) {
            if (entry.path().extension() != ".json") continue;
            auto const facts = read_json(entry.path()).at("/config/effective/Layerwise PCCheck (Improved)"_json_pointer);
            BOOST_TEST(facts.at("pool_bytes").get<std::uint64_t>() <= 40'000'000u);
            BOOST_TEST(facts.at("image_bytes").get<std::uint64_t>() >= 100'000'000u);
            BOOST_TEST(facts.at("max_in_flight") == 1);
        }
        return r;
    });
}

}  // namespace varve_test
