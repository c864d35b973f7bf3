#include <boost/test/unit_test.hpp>

#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

nlohmann::json the_result(std::filesystem::path const& dir) {
    for (auto const& entry : std::filesystem::directory_iterator(dir))
        if (auto name = entry.path().filename().string(); name.starts_with("comparison_") && name.ends_with(".json")) return read_json(entry.path());
    return {};
}

std::vector<std::string> const documented{"traditional", "traditional-durable", "original", "layerwise"};

/// Losses are those of `none`, step by step, and what is restored into a fresh model ends with the bits of the run.
void every_method_is_exact(std::vector<std::string> const& methods, std::vector<std::string> const& more, bool monitored = false) {
    temporary_folder folder;
    auto const r = run_tool(joined(
        joined({"bench", "--device", "cuda", "--output-dir", folder / "results", "--events", folder / "events"}, joined({"--methods"}, methods)),
        joined({"--num-steps", "40", "--warmup", "2"}, more)));
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
    auto const results = the_result(folder / "results").at("results");
    auto const expected = results.at("No Checkpoint").at("final_loss");
    BOOST_TEST(results.size() == methods.size() + 1);
    for (auto const& [key, result] : results.items()) {
        BOOST_TEST((result.at("final_loss") == expected), key);
        if (key == "No Checkpoint") continue;
        BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>(), key);
        BOOST_TEST(result.at("failed") == 0, key);
        if (monitored) BOOST_TEST(result.value("crash_safe", 0) > 0, key);
        BOOST_TEST(result.at("/memory/peak_gpu_gb"_json_pointer).get<double>() > 0, key);
    }
    BOOST_TEST(losses_in(folder / "events").size() == 40u);
}

}  // namespace

BOOST_AUTO_TEST_CASE(on_a_gpu_every_method_has_the_losses_of_none_and_is_restored_bit_for_bit) {
    if (!have_tool_gpu()) return;
    auto const methods = joined(documented, runnable({"pinned+sync+posix", "pinned+async+io_uring", "pinned+layerwise+posix", "pinned+layerwise+asio",
                                                      "gds+async+cufile", "gds+layerwise+cufile"}));
    BOOST_TEST(methods.size() >= 6u);
    every_method_is_exact(methods, tiny_model({"--checkpoint-freq", "3"}));
}

BOOST_AUTO_TEST_CASE(on_a_gpu_with_a_save_at_every_step_that_replaces_the_one_that_waits_too) {
    if (have_tool_gpu()) every_method_is_exact({"original", "layerwise"}, tiny_model({"--checkpoint-freq", "1", "--when-busy", "replace"}));
}

BOOST_AUTO_TEST_CASE(on_a_gpu_through_a_monitor_that_has_its_pool_page_locked_too) {
    if (!have_tool_gpu()) return;
    auto const methods = runnable({"original-monitor", "layerwise-monitor"});
    if (methods.empty()) return skip("the monitor is not built");
    every_method_is_exact(methods, tiny_model({"--checkpoint-freq", "3"}));
    every_method_is_exact(methods, tiny_model({"--checkpoint-freq", "1", "--when-busy", "replace"}));
    every_method_is_exact({"pinned+sync+posix"}, tiny_model({"--checkpoint-freq", "3", "--use-monitor"}), true);
}

BOOST_AUTO_TEST_CASE(on_a_gpu_through_a_monitor_with_a_pool_in_the_gpus_memory_too) {
    if (!have_tool_gpu()) return;
    auto const methods = runnable({"gds+sync+cufile", "gds+async+cufile", "gds+layerwise+cufile"});
    if (methods.empty() || runnable({"layerwise-monitor"}).empty()) return skip("cuFile or the monitor is not built");
    every_method_is_exact(methods, tiny_model({"--checkpoint-freq", "3", "--use-monitor"}), true);
    every_method_is_exact(methods, tiny_model({"--checkpoint-freq", "1", "--when-busy", "replace", "--use-monitor"}), true);
}

BOOST_AUTO_TEST_CASE(on_a_gpu_without_snapshots_and_with_a_pool_that_is_smaller_than_a_checkpoint_too) {
    if (!have_tool_gpu()) return;
    // 126 MB through eight blocks of 8 MiB; layerwise through 16 of 4 MiB.
    every_method_is_exact({"original", "layerwise"},
                          {"--d-model",         "256", "--num-layers",   "2",   "--nhead",        "4",  "--vocab-size",     "20000",
                           "--dim-feedforward", "256", "--num-samples",  "50",  "--seq-len",      "32", "--batch-size",     "4",
                           "--checkpoint-freq", "3",   "--gpu-snapshot", "off", "--pool-size-mb", "70", "--buffer-size-mb", "5"});
}

BOOST_AUTO_TEST_CASE(a_checkpoint_of_a_gpu_is_read_by_the_commands_on_files) {
    if (!have_tool_gpu()) return;
    temporary_folder folder;
    BOOST_TEST_REQUIRE(run_tool(joined({"train", "--device", "cuda", "--method", "layerwise", "--dir", folder / "run", "--num-steps", "8"},
                                       tiny_model({"--checkpoint-freq", "4"})))
                           .code == 0);
    expect_whole(folder / "run");
    auto const compared = run_tool({"diff", newest_file(folder / "run"), newest_file(folder / "run")});
    BOOST_TEST(compared.code == 0, compared.out << compared.err);
}

BOOST_AUTO_TEST_CASE(probe_measures_the_copies_of_a_gpu) {
    if (!have_tool_gpu()) return;
    temporary_folder folder;
    auto const r = run_tool({"probe", "--dir", folder.path().string(), "--size-mb", "64", "--json", folder / "limits.json"});
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
    auto const copies = read_json(folder / "limits.json").at("copies");
    for (char const* way : {"device_to_host", "host_to_device", "device_to_device"})
        BOOST_TEST(copies.at(std::string(way) + "_gb_per_s").get<double>() > 0.5, way);
}

}  // namespace varve_test
