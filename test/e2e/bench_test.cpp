#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#include <algorithm>
#include <csignal>
#include <fstream>

#include "free_port.hpp"
#include "monitored_runs.hpp"
#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

using json = nlohmann::json;

fs::path result_in(fs::path const& dir) {
    for (auto const& entry : fs::directory_iterator(dir))
        if (auto name = entry.path().filename().string(); name.starts_with("comparison_") && name.ends_with(".json")) return entry.path();
    return {};
}

/// One comparison of everything that runs here, which several cases look at.
struct comparison {
    comparison() {
        run =
            run_tool(joined({"bench", "--output-dir", folder / "results", "--events", folder / "events", "--repeat", "2", "--methods", "traditional",
                             "traditional-durable", "original", "layerwise", "host+sync+posix", "host+layerwise+memory", "host+async+null"},
                            tiny_model({"--num-steps", "12", "--checkpoint-freq", "5", "--warmup", "1", "--keep", "1"})));
        if (run.code == 0) document = read_json(result_in(folder / "results"));
    }
    temporary_folder folder;
    outcome run;
    json document;
};

comparison const& shared_comparison() {
    static comparison const instance;
    return instance;
}

std::vector<std::string> const with_files{"Traditional PyTorch Checkpoint", "Traditional PyTorch Checkpoint (durable)", "Original PCCheck",
                                          "Layerwise PCCheck (Improved)", "host+sync+posix"};

bool holds_null(json const& value) {
    if (value.is_null()) return true;
    return value.is_structured() && std::any_of(value.begin(), value.end(), holds_null);
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_method_runs_and_is_restored_bit_for_bit) {
    auto const& c = shared_comparison();
    BOOST_TEST_REQUIRE(c.run.code == 0, c.run.err);
    auto const& results = c.document["results"];
    BOOST_TEST(results.size() == 8u);
    for (auto const& key : with_files) BOOST_TEST(results.at(key).at("/restore/bit_exact"_json_pointer).get<bool>(), key);
}

BOOST_AUTO_TEST_CASE(every_method_has_the_losses_of_a_run_without_checkpoints) {
    auto const& c = shared_comparison();
    BOOST_TEST_REQUIRE(c.run.code == 0, c.run.err);
    auto const& results = c.document["results"];
    auto const expected = results.at("No Checkpoint").at("final_loss");
    for (auto const& [key, result] : results.items()) BOOST_TEST((result.at("final_loss") == expected), key);
    // And step by step, from the events.
    BOOST_TEST(losses_in(c.folder / "events").size() == 12u);
}

BOOST_AUTO_TEST_CASE(every_method_has_the_same_losses_and_bits_with_the_other_kernels_of_the_update) {
    for (std::string const update : {"foreach", "fused"}) {
        if (!has_update(update)) {
            skip("this LibTorch has no " + update + " update");
            continue;
        }
        temporary_folder folder;
        auto const r = run_tool(joined({"bench", "--output-dir", folder.path().string(), "--update", update, "--device", "cpu", "--methods",
                                        "traditional", "original", "layerwise"},
                                       tiny_model({"--num-steps", "12", "--checkpoint-freq", "5", "--warmup", "1"})));
        BOOST_TEST_REQUIRE(r.code == 0, r.err);
        auto const document = read_json(result_in(folder.path()));
        BOOST_TEST(document.at("/config/run/update"_json_pointer) == update);
        auto const& results = document.at("results");
        auto const expected = results.at("No Checkpoint").at("final_loss");
        BOOST_TEST(results.size() == 4u);
        for (auto const& [key, result] : results.items()) {
            BOOST_TEST((result.at("final_loss") == expected), key);
            if (key != "No Checkpoint") BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>(), key);
        }
    }
}

BOOST_AUTO_TEST_CASE(the_result_has_every_key_and_no_null) {
    auto const& c = shared_comparison();
    BOOST_TEST_REQUIRE(c.run.code == 0, c.run.err);
    auto const& d = c.document;
    BOOST_TEST(!holds_null(d));
    for (char const* key :
         {"/machine/cores", "/config/model/d_model", "/config/training/checkpoint_freq", "/config/pccheck/max_async", "/config/run/seed",
          "/config/effective/Original PCCheck/combination", "/config/command", "/limits/direct/write_gb_per_s", "/started", "/version"})
        BOOST_TEST(d.contains(json::json_pointer(key)), key);
    for (auto const& key : with_files) {
        auto check = [&](json const& r) {
            for (char const* path : {"/checkpoint/mean_ms",
                                     "/checkpoint/std_ms",
                                     "/checkpoint/min_ms",
                                     "/checkpoint/max_ms",
                                     "/checkpoint/total_ms",
                                     "/stall/mean_ms",
                                     "/stall/p50_ms",
                                     "/stall/p99_ms",
                                     "/stall/wait_ms",
                                     "/stall/gpu_wait_ms",
                                     "/latency/mean_ms",
                                     "/latency/p50_ms",
                                     "/latency/p99_ms",
                                     "/training_step/mean_ms",
                                     "/training_step/std_ms",
                                     "/memory/peak_cpu_gb",
                                     "/memory/mean_cpu_gb",
                                     "/memory/peak_gpu_gb",
                                     "/throughput/samples_per_sec",
                                     "/throughput/total_samples",
                                     "/io_performance/data_size_gb",
                                     "/io_performance/mean_io_throughput_gbps",
                                     "/io_performance/max_io_throughput_gbps",
                                     "/io_performance/min_io_throughput_gbps",
                                     "/loop_time_sec",
                                     "/drained_time_sec",
                                     "/total_time_sec",
                                     "/setup_time_sec",
                                     "/checkpoint_overhead_percent",
                                     "/overhead_vs_none_percent",
                                     "/floor_sec",
                                     "/over_floor",
                                     "/final_loss",
                                     "/restore/time_ms",
                                     "/restore/gbps",
                                     "/restore/warm_gbps",
                                     "/restore/bit_exact"})
                BOOST_TEST(r.contains(json::json_pointer(path)), key << path);
            BOOST_TEST(r.at("/checkpoint/count"_json_pointer) == 2);
            BOOST_TEST(r.at("written") == 2);
            BOOST_TEST(r.at("durable") == (key == with_files.front() ? 0 : 2));
            for (char const* none : {"skipped", "replaced", "failed"}) BOOST_TEST(r.at(none) == 0);
            BOOST_TEST(r.at("drained_time_sec").get<double>() >= r.at("loop_time_sec").get<double>());
            for (auto const& [name, value] : r.items()) BOOST_TEST(!name.starts_with("_"));
        };
        auto const& result = d["results"].at(key);
        check(result);
        BOOST_TEST_REQUIRE(result.at("repeats").size() == 2u);
        for (auto const& repeat : result["repeats"]) check(repeat);
    }
    auto const& none = d["results"].at("No Checkpoint");
    for (char const* absent : {"checkpoint", "stall", "latency", "restore", "io_performance", "overhead_vs_none_percent"})
        BOOST_TEST(!none.contains(absent), absent);
    BOOST_TEST(!d["results"].at("host+async+null").contains("restore"));
}

BOOST_AUTO_TEST_CASE(stores_are_gone_afterwards_and_durable_comes_last) {
    auto const& c = shared_comparison();
    BOOST_TEST_REQUIRE(c.run.code == 0, c.run.err);
    BOOST_TEST(!fs::exists(c.folder / "results/checkpoints"));
    std::map<std::pair<std::string, std::uint64_t>, std::vector<std::string>> saves;
    for (auto const& e : read_events(c.folder / "events"))
        if (e.at("event") != "step") saves[{e.at("method"), e.at("step")}].push_back(e.at("event"));
    auto const& seen = saves.at({"layerwise", 10});
    auto at = [&](char const* what) { return std::find(seen.begin(), seen.end(), what) - seen.begin(); };
    BOOST_TEST(at("begin") == 0);
    BOOST_TEST(at("staged") < at("durable"));
    BOOST_TEST(at("written") < at("durable"));
    BOOST_TEST(at("durable") < static_cast<std::ptrdiff_t>(seen.size()));
}

BOOST_AUTO_TEST_CASE(combinations_with_asio_restore_bit_for_bit_and_change_no_loss) {
    if (!runs_here("host+async+asio")) return skip("no Boost.Asio files here");
    temporary_folder folder;
    std::vector<std::string> const combinations{"host+async+asio", "host+layerwise+asio"};
    auto const r = run_tool(joined({"bench", "--output-dir", folder.path().string(), "--methods", "none", combinations[0], combinations[1]},
                                   tiny_model({"--num-steps", "12", "--checkpoint-freq", "5", "--warmup", "0"})));
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
    auto const results = read_json(result_in(folder.path())).at("results");
    for (auto const& name : combinations) {
        auto const& result = results.at(name);
        BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>(), name);
        BOOST_TEST(result.at("durable") == 2);
        BOOST_TEST(result.at("final_loss") == results.at("No Checkpoint").at("final_loss"));
    }
}

BOOST_AUTO_TEST_CASE(a_comparison_with_monitors_has_what_was_crash_safe_and_the_same_bits) {
    if (!runs_here("layerwise-monitor")) return skip("the monitor is not built");
    temporary_folder folder;
    auto const r = run_tool(joined({"bench", "--scenario", "monitor", "--output-dir", folder.path().string()},
                                   tiny_model({"--num-steps", "12", "--checkpoint-freq", "5", "--warmup", "0"})));
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
    auto const document = read_json(result_in(folder.path()));
    auto const& results = document.at("results");
    for (std::string const name : {"Layerwise PCCheck (Improved)", "Layerwise PCCheck (Improved), monitor"}) {
        BOOST_TEST_REQUIRE(results.contains(name), name);
        auto const& result = results.at(name);
        BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>(), name);
        BOOST_TEST(result.at("durable") == 2);
        BOOST_TEST(result.at("cpu_time_sec").get<double>() > 0);
        BOOST_TEST(result.at("final_loss") == results.at("No Checkpoint").at("final_loss"));
        if (!name.ends_with("monitor")) continue;
        BOOST_TEST(result.at("crash_safe") == 2);
        auto const sink = document.at("config").at("effective").at(name).at("sink").get<std::string>();
        BOOST_TEST(sink.find("blocks by reference") != std::string::npos, sink);
    }
    auto const report = run_tool({"report", "--input-dir", folder.path().string(), "--output-file", folder / "report.md"});
    BOOST_TEST(report.code == 0, report.err);
    auto const text = read_text(folder / "report.md");
    for (std::string const name : {"| Layerwise PCCheck (Improved) |", "| Layerwise PCCheck (Improved), monitor |"})
        BOOST_TEST(text.find(name) != std::string::npos, text);
}

BOOST_AUTO_TEST_CASE(with_use_monitor_the_original_is_chk_monitors_row_and_nothing_is_left) {
    if (!runs_here("original-monitor")) return skip("the monitor is not built");
    workplace w;
    auto const dir = w.folder / "results";
    for (std::string const as : {"", "-monitor"}) {
        std::vector<std::string> how{"bench", "--output-dir", dir, "--methods", "original" + as, "layerwise" + as};
        if (as.empty()) how.push_back("--use-monitor");
        auto const r = run_tool(joined(how, tiny_model({"--num-steps", "12", "--checkpoint-freq", "5", "--warmup", "0"})));
        BOOST_TEST_REQUIRE(r.code == 0, r.err);
        auto const results = read_json(result_in(dir)).at("results");
        for (std::string const method : {"Original PCCheck", "Layerwise PCCheck (Improved)"}) {
            auto const name = method + (as.empty() ? "" : ", monitor");
            BOOST_TEST_REQUIRE(results.contains(name), results.dump());
            auto const& result = results.at(name);
            BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>(), name);
            BOOST_TEST(result.at("crash_safe") == 2);
            BOOST_TEST(result.at("durable") == 2);
            BOOST_TEST(result.at("final_loss") == results.at("No Checkpoint").at("final_loss"));
        }
        BOOST_TEST(w.monitors().empty());
        BOOST_TEST(fs::is_empty(w.folder.path() / "sockets"));
        fs::remove_all(dir);
    }
}

BOOST_AUTO_TEST_CASE(at_a_monitor_on_another_host_a_bench_leaves_the_stores_of_others_alone) {
    if (!runs_here("layerwise-monitor")) return skip("the monitor is not built");
    temporary_folder folder;
    auto const port = std::to_string(free_port());
    running_tool monitor({"monitor", "--dir", folder / "stores", "--tcp", "127.0.0.1:" + port});
    BOOST_TEST_REQUIRE(answers({"--tcp", "127.0.0.1:" + port}));
    auto const small = [&](std::string const& width) {
        return std::vector<std::string>{"--d-model",         "32",
                                        "--num-layers",      "1",
                                        "--nhead",           "2",
                                        "--vocab-size",      "500",
                                        "--dim-feedforward", width,
                                        "--num-samples",     "40",
                                        "--seq-len",         "8",
                                        "--batch-size",      "2",
                                        "--num-steps",       "12",
                                        "--checkpoint-freq", "5",
                                        "--monitor",         "tcp:127.0.0.1:" + port};
    };
    // With a slash behind it, it is the same folder.
    trains(joined({"train", "--method", "layerwise", "--dir", folder / "layerwise/"}, small("16")));
    auto const trained = stored_steps(folder / "stores/layerwise");
    auto const text = read_text(newest_file(folder / "stores/layerwise"));
    // The second one starts over what the first one left there.
    for (std::string const width : {"16", "32"}) {
        auto const r = run_tool(joined(
            {"bench", "--methods", "layerwise", "--output-dir", folder / width, "--checkpoint-dir", folder / "ck", "--warmup", "0"}, small(width)));
        BOOST_TEST_REQUIRE(r.code == 0, r.err);
        auto const result = read_json(result_in(folder / width)).at("results").at("Layerwise PCCheck (Improved)");
        BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>());
        BOOST_TEST(result.at("/restore/gbps"_json_pointer).get<double>() < 1000);
    }
    BOOST_TEST(stored_steps(folder / "stores/layerwise") == trained, boost::test_tools::per_element());
    BOOST_TEST((read_text(newest_file(folder / "stores/layerwise")) == text));
    monitor.signal(SIGTERM);
    BOOST_TEST(monitor.wait().code == 0);
}

BOOST_AUTO_TEST_CASE(saves_that_give_way_are_counted_and_the_others_are_durable) {
    temporary_folder folder;
    for (std::string const busy : {"skip", "replace"}) {
        auto const r = run_tool(joined({"bench", "--output-dir", folder / busy, "--methods", "layerwise", "--when-busy", busy},
                                       tiny_model({"--num-steps", "30", "--checkpoint-freq", "1", "--warmup", "0"})));
        BOOST_TEST_REQUIRE(r.code == 0, r.err);
        auto const result = read_json(result_in(folder / busy)).at("results").at("Layerwise PCCheck (Improved)");
        auto const of = [&](char const* what) { return result.at(what).get<int>(); };
        BOOST_TEST(of("durable") + of("skipped") + of("replaced") == 30, busy);
        BOOST_TEST(of("failed") == 0);
        BOOST_TEST(of("durable") > 0);
        BOOST_TEST(result.at("/restore/bit_exact"_json_pointer).get<bool>(), busy);
    }
}

BOOST_AUTO_TEST_CASE(probe_measures_every_sink_that_runs_here) {
    temporary_folder folder;
    auto const entries = [&] { return std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()); };
    auto const r = run_tool({"probe", "--dir", folder.path().string(), "--size-mb", "9", "--json", folder / "limits.json"});
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
    BOOST_TEST(entries() == 1);  // what was asked for
    auto const limits = read_json(folder / "limits.json");
    for (auto const* what : {"/direct/write_gb_per_s", "/direct/read_gb_per_s", "/copies/memory_gb_per_s", "/digest_gb_per_s"})
        BOOST_TEST(limits.at(json::json_pointer(what)).get<double>() > 0, what);
    auto const& sinks = limits.at("sinks");
    for (std::string name : {"posix", "io_uring", "asio"}) {
        if (!runs_here("host+sync+" + name)) continue;
        BOOST_TEST_REQUIRE(sinks.contains(name), name);
        BOOST_TEST(sinks.at(name).at("write_gb_per_s").get<double>() > 0);
    }
}

BOOST_AUTO_TEST_CASE(kept_checkpoints_stay_and_the_next_bench_empties_them) {
    temporary_folder folder;
    auto const args = joined({"bench", "--methods", "layerwise", "--output-dir", folder.path().string(), "--keep-checkpoints"},
                             tiny_model({"--num-steps", "12", "--checkpoint-freq", "5", "--warmup", "0", "--keep", "2"}));
    BOOST_TEST_REQUIRE(run_tool(args).code == 0);
    auto const store = folder / "checkpoints/layerwise";
    BOOST_TEST(stored_steps(store) == (std::vector<std::uint64_t>{5, 10}), boost::test_tools::per_element());
    auto again = args;
    again.insert(again.end(), {"--seed", "5"});  // another run: nothing of the first may stand in its way
    auto const r = run_tool(again);
    BOOST_TEST(r.code == 0, r.err);
    BOOST_TEST(stored_steps(store) == (std::vector<std::uint64_t>{5, 10}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_sweep_of_frequencies_writes_a_result_for_each) {
    temporary_folder folder;
    auto const r = run_tool(
        joined({"bench", "--scenario", "frequency", "--output-dir", folder.path().string()}, tiny_model({"--num-steps", "10", "--warmup", "0"})));
    BOOST_TEST_REQUIRE(r.code == 0, r.err);
    BOOST_TEST(r.err.find("every 20 steps is left out") != std::string::npos);
    std::vector<int> frequencies;
    for (auto const& entry : fs::directory_iterator(folder.path()))
        if (entry.path().extension() == ".json") {
            auto const frequency = read_json(entry.path()).at("/config/training/checkpoint_freq"_json_pointer).get<int>();
            BOOST_TEST(entry.path().string().ends_with("_freq" + std::to_string(frequency) + ".json"));
            frequencies.push_back(frequency);
        }
    std::sort(frequencies.begin(), frequencies.end());
    BOOST_TEST(frequencies == (std::vector<int>{5, 10}), boost::test_tools::per_element());
    auto const report = run_tool({"report", "--input-dir", folder.path().string(), "--output-file", folder / "report.md"});
    BOOST_TEST(report.code == 0, report.err);
    BOOST_TEST(fs::exists(folder / "report.md"));
}

BOOST_AUTO_TEST_CASE(a_store_that_is_anothers_stays_as_it_is) {
    temporary_folder folder;
    auto const bench = joined({"bench", "--methods", "layerwise", "--output-dir", folder / "results", "--keep-checkpoints"},
                              tiny_model({"--num-steps", "10", "--checkpoint-freq", "5", "--warmup", "0"}));
    auto const store = folder / "results/checkpoints/layerwise";
    auto refused = [&](std::string const& why) {
        auto const r = run_tool(bench);
        BOOST_TEST(r.code == 1);
        BOOST_TEST(line_count(r.err) == 1u, r.err);
        BOOST_TEST(r.err.find(why) != std::string::npos, r.err);
        BOOST_TEST(!stored_steps(store).empty());
    };
    BOOST_TEST_REQUIRE(run_tool(bench).code == 0);
    // Somebody's file, a writer at work, and a run that went on from there.
    std::ofstream(fs::path(store) / "notes.txt") << "mine";
    refused("notes.txt");
    fs::remove(fs::path(store) / "notes.txt");
    auto const train = [&](std::string const& steps) {
        return joined({"train", "--method", "layerwise", "--dir", store, "--events", folder / "events"},
                      tiny_model({"--num-steps", steps, "--checkpoint-freq", "5"}));
    };
    int const mark = ::open((store + "/.varve").c_str(), O_RDWR | O_CLOEXEC);
    BOOST_TEST_REQUIRE(::flock(mark, LOCK_EX | LOCK_NB) == 0);
    refused("another process is writing");
    ::close(mark);
    auto const trained = run_tool(train("12"));
    BOOST_TEST_REQUIRE(trained.code == 0, trained.err);
    refused("varve bench did not write");
    BOOST_TEST(stored_steps(store).back() == 12u);
}

BOOST_AUTO_TEST_CASE(what_was_measured_is_not_lost_to_a_method_that_fails) {
    if (!runs_here("layerwise-monitor")) return skip("the monitor is not built");
    temporary_folder folder;
    auto const r = run_tool(
        joined({"bench", "--methods", "traditional", "layerwise", "--monitor", "unix:" + (folder / "nobody"), "--output-dir", folder / "results"},
               tiny_model({"--num-steps", "10", "--checkpoint-freq", "5", "--warmup", "0"})));
    BOOST_TEST(r.code == 1);
    BOOST_TEST(r.err.find("layerwise: cannot connect to the monitor") != std::string::npos, r.err);
    auto const result = result_in(folder / "results");
    BOOST_TEST_REQUIRE(!result.empty());
    auto const results = read_json(result).at("results");
    BOOST_TEST(results.size() == 2u);
    BOOST_TEST(results.at("Traditional PyTorch Checkpoint").at("/restore/bit_exact"_json_pointer).get<bool>());
}

BOOST_AUTO_TEST_CASE(a_stopped_bench_drains_and_writes_no_result) {
    temporary_folder folder;
    running_tool bench(joined({"bench", "--methods", "layerwise", "--output-dir", folder.path().string(), "--events", folder / "events"},
                              tiny_model({"--num-steps", "100000", "--checkpoint-freq", "5", "--warmup", "0"})));
    BOOST_TEST_REQUIRE(bench.comes_to_write_events(folder / "events"));
    bench.signal(SIGTERM);
    BOOST_TEST_REQUIRE(bench.ends_within(std::chrono::seconds(60)));
    auto const r = bench.wait();
    BOOST_TEST(r.code == 130, r.err);
    BOOST_TEST(result_in(folder.path()).empty());
}

void keeps_whole_rounds(std::string const& method) {
    temporary_folder folder;
    running_tool bench(joined({"bench", "--methods", method, "--repeat", "1000", "--output-dir", folder / "results", "--events", folder / "events"},
                              tiny_model({"--num-steps", "4", "--checkpoint-freq", "2", "--warmup", "0"})));
    BOOST_TEST_REQUIRE(bench.comes_to([&] {
        if (!std::filesystem::exists(folder / "events")) return false;
        auto const events = read_events(folder / "events");
        return std::count_if(events.begin(), events.end(), [](auto const& e) { return e.at("event") == "step" && e.at("method") == "none"; }) > 4;
    }));
    bench.signal(SIGINT);
    BOOST_TEST_REQUIRE(bench.ends_within(std::chrono::seconds(60)));
    auto const r = bench.wait();
    BOOST_TEST(r.code == 130, r.err);
    BOOST_TEST(r.err.find("the result is of the ") != std::string::npos, r.err);
    auto const result = result_in(folder / "results");
    BOOST_TEST_REQUIRE(!result.empty(), r.err);
    auto const document = read_json(result);
    auto const rounds = document.at("/config/run/repeat"_json_pointer).get<std::size_t>();
    BOOST_TEST((rounds >= 1 && rounds < 1000));
    for (auto const& [key, of] : document.at("results").items()) {
        BOOST_TEST(of.at("final_loss").is_number(), key);
        BOOST_TEST((of.contains("repeats") ? of.at("repeats").size() : 1) == rounds, key);
    }
}

BOOST_AUTO_TEST_CASE(a_bench_that_is_stopped_in_a_later_round_keeps_those_before) {
    for (char const* method : {"layerwise", "none"}) keeps_whole_rounds(method);
}

}  // namespace varve_test
