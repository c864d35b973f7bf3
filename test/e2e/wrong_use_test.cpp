#include <boost/test/unit_test.hpp>

#include <cerrno>
#include <fstream>

#include "refused_rings.hpp"
#include "support.hpp"
#include "tool.hpp"

namespace varve_test {

namespace {

/// Wrong use: one line that contains `words`, nothing on standard output.
void refused(std::vector<std::string> const& args, std::string const& words, int code = 2) {
    std::string shown;
    for (auto const& a : args) shown += a + " ";
    auto const r = run_tool(args);
    BOOST_TEST_CONTEXT("varve " << shown << ": " << r.err) {
        BOOST_TEST(r.code == code);
        BOOST_TEST(line_count(r.err) == 1u);
        BOOST_TEST(r.out.empty());
        BOOST_TEST(r.err.find(words) != std::string::npos);
    }
}

bool has_monitor() { return run_tool({"monitor", "--help"}).code == 0; }

std::string write_file(temporary_folder const& folder, std::string const& text) {
    auto const path = folder / "settings.yaml";
    std::ofstream(path) << text;
    return path;
}

}  // namespace

BOOST_AUTO_TEST_CASE(wrong_options_get_one_line_that_says_what_to_do) {
    refused({}, "--help");
    refused({"benhc"}, "unknown command 'benhc'");
    refused({"bench", "--d-modl", "3"}, "did you mean --d-model");
    refused({"bench", "--nonsense"}, "unknown option --nonsense");
    refused({"bench", "extra"}, "'extra'");
    refused({"bench", "--d-model"}, "--d-model");
    refused({"bench", "--d-model", "64", "--d-model", "64"}, "twice");
    refused({"train", "--method", "layerwise"}, "--dir is missing");
    refused({"train", "--dir", "/tmp/x"}, "--method is missing");
    refused({"train", "--method", "layerwise", "--dir", "/tmp/x", "--overwrite"}, "--fresh");
    refused({"report", "--input", "x"}, "--help");
}

BOOST_AUTO_TEST_CASE(a_monitor_that_makes_no_sense_is_refused) {
    if (!has_monitor()) return skip("the monitor is not built");
    refused({"bench", "--monitor", "nowhere"}, "--monitor");
    refused({"bench", "--methods", "gds+async+cufile", "--monitor", "tcp:127.0.0.1:7000"}, "take pinned");
    refused({"monitor"}, "--dir");
    refused({"monitor", "--dir", "/tmp/x"}, "--unix PATH or --tcp HOST:PORT");
    refused({"monitor", "--dir", "/tmp/x", "--tcp", "0.0.0.0:0"}, "--cert");
    refused({"monitor", "--dir", "/tmp/x", "--tcp", "nowhere"}, "HOST:PORT");
    refused({"monitor", "--dir", "/tmp/x", "--unix", "/tmp/x.sock", "--linger", "long"}, "--linger");
    refused({"monitor", "--dir", "/tmp/x", "--unix", "/tmp/x.sock", "--cert", "c"}, "go together");
    refused({"monitor", "--dir", "/tmp/x", "--unix", "/tmp/x.sock", "--peer", "nowhere"}, "HOST:PORT");
    refused({"monitor", "--dir", "/tmp/x", "--unix", "/tmp/x.sock", "--peer", "192.0.2.7:7000"}, "--cert");
    refused({"train", "--method", "layerwise", "--dir", "/tmp/x", "--peer", "127.0.0.1:7000"}, "--use-monitor");
    refused({"monitor", "--status", "--unix", "/tmp/no such socket"}, "cannot connect", 1);
    refused({"train", "--method", "traditional", "--dir", "/tmp/x", "--use-monitor"}, "cannot go through a monitor");
    refused({"bench", "--durable-interval", "2", "--when-busy", "replace"}, "--durable-interval goes with a monitor");
    refused({"bench", "--durable-interval", "2", "--use-monitor"}, "--when-busy replace");
    refused({"bench", "--durable-interval", "2", "--use-monitor", "--when-busy", "replace", "--methods", "host+sync+posix"}, "host+sync+posix");
    refused({"train", "--method", "layerwise", "--dir", "/tmp/x", "--monitor", "nowhere"}, "unix:PATH or tcp:HOST:PORT");
    refused({"train", "--method", "layerwise", "--dir", "/tmp/x", "--cert", "c"}, "go together");
    refused({"train", "--method", "layerwise", "--dir", "/tmp/x", "--monitor", "unix:/tmp/no such socket"}, "cannot connect", 1);
}

BOOST_AUTO_TEST_CASE(values_out_of_range_are_named) {
    refused({"bench", "--d-model", "0"}, "--d-model '0': must be from 1 to");
    refused({"bench", "--num-steps", "-1"}, "--num-steps '-1'");
    refused({"bench", "--num-steps", "99999999999999999999999"}, "--num-steps");
    refused({"bench", "--seq-len", "513"}, "to 512");
    refused({"bench", "--lr", "nan"}, "--lr 'nan'");
    refused({"bench", "--dropout", "1"}, "--dropout '1'");
    refused({"bench", "--nhead", "7"}, "--nhead 7 must divide --d-model 512");
    refused({"bench", "--when-busy", "wait"}, "block, skip or replace");
    refused({"bench", "--num-steps", "5"}, "no checkpoint is due");
    refused({"bench", "--d-model", "1000000", "--nhead", "1"}, "memory");
    refused({"bench", "--scenario", "tiny"}, "small, medium, large, frequency, monitor or all");
}

BOOST_AUTO_TEST_CASE(what_is_not_built_is_said) {
    if (tool_has_gpu()) return skip("what needs a GPU can run here");
    if (!has_monitor()) {
        refused({"bench", "--use-monitor"}, "monitor is not built");
        refused({"bench", "--scenario", "monitor"}, "monitor is not built");
        refused({"monitor", "--dir", "/tmp/x", "--unix", "/tmp/x.sock"}, "monitor is not built");
    }
    refused({"bench", "--device", "cuda"}, "no CUDA");
    refused({"bench", "--update", "fast"}, "plain, foreach or fused");
    if (!has_update("fused")) refused({"bench", "--update", "fused"}, "take plain");
    if (!has_update("foreach")) refused({"train", "--method", "layerwise", "--dir", "/tmp/x", "--update", "foreach"}, "take plain");
    refused({"bench", "--gpu-snapshot", "on"}, "no CUDA");
    refused({"bench", "--methods", "nonsense"}, "unknown method 'nonsense'");
    if (!runs_here("host+async+asio")) refused({"bench", "--methods", "host+async+asio"}, "method host+async+asio: ");
    refused({"bench", "--methods", "pinned+async+posix"}, "pinned");
    refused({"bench", "--methods", "gds+layerwise+io_uring"}, "gds");
    refused({"train", "--method", "none", "--dir", "/tmp/x"}, "no files");
    refused({"train", "--method", "host+sync+null", "--dir", "/tmp/x"}, "no files");
}

BOOST_AUTO_TEST_CASE(a_combination_whose_ring_is_refused_here_is_a_usage_error_that_says_why) {
    if (!runs_here("host+async+asio")) return skip("no Boost.Asio files here");
    int const status = in_a_child([] {
        if (!refuse_rings(EPERM)) return 77;
        for (std::string const name : {"host+async+asio", "host+async+io_uring"}) {
            auto const r = run_tool({"bench", "--methods", name});
            bool const said = r.err.find("method " + name + ": the kernel refuses io_uring here") != std::string::npos;
            if (r.code != 2 || !r.out.empty() || line_count(r.err) != 1 || !said) return 1;
        }
        return 0;
    });
    if (status == 77) return skip("no seccomp filters here");
    BOOST_TEST(status == 0);
}

BOOST_AUTO_TEST_CASE(a_wrong_configuration_file_is_refused_with_its_key) {
    temporary_folder folder;
    auto with = [&](std::string const& text) { return std::vector<std::string>{"bench", "--config", write_file(folder, text)}; };
    refused({"bench", "--config", folder / "absent.yaml"}, "cannot read");
    refused({"bench", "--config", folder.path()}, "cannot read");
    refused({"bench", "--config", ""}, "--config '': must not be empty");
    refused(with("model:\n  d_modl: 64\n"), "unknown key model.d_modl");
    refused(with("model:\n  seq_len: 64\n"), "it belongs to training");
    refused(with("models:\n  d_model: 64\n"), "unknown section models");
    refused(with("model:\n  d_model: lots\n"), "model.d_model 'lots'");
    refused(with("model: [1, 2]\n"), "model must hold");
    refused(with("model:\n  d_model: 64\n  d_model: 32\n"), "twice");
    refused(with("model: {d_model: 64\n"), "not YAML");
    refused(with("pccheck:\n  use_monitor: perhaps\n"), "pccheck.use_monitor");
    refused(with("model:\n  d_model: 64\n---\nmodel:\n  d_model: 32\n"), "2 documents");
}

BOOST_AUTO_TEST_CASE(what_the_result_cannot_say_is_refused_before_anything_is_made) {
    temporary_folder folder;
    auto const results = folder / "caf\xe9";
    refused({"bench", "--output-dir", results}, "--output-dir: is no UTF-8");
    BOOST_TEST(!std::filesystem::exists(results));
}

BOOST_AUTO_TEST_CASE(settings_come_from_default_scenario_file_and_flag_in_that_order) {
    temporary_folder folder;
    auto const file = write_file(folder, "training:\n  num_steps: 40\n  checkpoint_freq: 8\nrun:\n  methods: [layerwise]\n  warmup: 3\n");
    auto const plan = run_tool({"bench", "--scenario", "small", "--config", file, "--checkpoint-freq", "4", "--dry-run"});
    BOOST_TEST(plan.code == 0);
    BOOST_TEST_CONTEXT(plan.out) {
        BOOST_TEST(plan.out.find("none, layerwise: 3 warm-up steps, 40 steps, 10 checkpoints") != std::string::npos);
        BOOST_TEST(plan.out.find("about 0.0") != std::string::npos);  // of the small scenario's model
    }
}

BOOST_AUTO_TEST_CASE(a_dry_run_of_everything_does_nothing) {
    temporary_folder folder;
    auto const r = run_tool({"bench", "--scenario", "all", "--dry-run", "--output-dir", folder / "results"});
    BOOST_TEST(r.code == 0);
    BOOST_TEST((has_monitor() ? r.out : r.err).find("monitor") != std::string::npos);
    BOOST_TEST(r.out.find("frequency: every 50 steps") != std::string::npos);
    BOOST_TEST(!std::filesystem::exists(folder / "results"));
}

BOOST_AUTO_TEST_CASE(a_dry_run_tells_the_pool_of_methods_with_a_monitor_and_without) {
    auto pool_of = [](std::vector<std::string> const& more) {
        auto const r =
            run_tool(joined({"bench", "--dry-run", "--d-model", "32", "--num-layers", "1", "--nhead", "2", "--vocab-size", "20000"}, more));
        BOOST_TEST_REQUIRE(r.code == 0, r.err);
        auto const at = r.out.find("staging pool");
        return r.out.substr(at, r.out.find('\n', at) - at);
    };
    auto const one = pool_of({"--methods", "layerwise"});
    BOOST_TEST(one.find("monitor") == std::string::npos, one);
    BOOST_TEST(pool_of({"--methods", "layerwise", "--pool-size-mb", "3"}).find("0.003") != std::string::npos);
    if (!has_monitor()) return skip("the monitor is not built");
    BOOST_TEST(pool_of({"--methods", "layerwise", "layerwise-monitor"}).starts_with(one + "; "));
    BOOST_TEST(pool_of({"--methods", "layerwise", "--use-monitor"}).ends_with("with a monitor"));
    BOOST_TEST(pool_of({"--methods", "layerwise", "--use-monitor"}) !=
               pool_of({"--methods", "layerwise", "--use-monitor", "--when-busy", "replace"}));
}

BOOST_AUTO_TEST_CASE(help_and_list_are_there) {
    for (std::vector<std::string> const& args : {std::vector<std::string>{"--help"},
                                                 {"--version"},
                                                 {"bench", "--help"},
                                                 {"bench", "-h"},
                                                 {"train", "--help"},
                                                 {"report", "--help"},
                                                 {"bench", "--list"}}) {
        auto const r = run_tool(args);
        BOOST_TEST(r.code == 0);
        BOOST_TEST(line_count(r.out) > 3u);
        BOOST_TEST(r.err.empty());
    }
}

BOOST_AUTO_TEST_CASE(what_goes_wrong_in_a_method_s_own_process_is_one_line_too) {
    temporary_folder folder;
    refused(joined({"bench", "--methods", "none", "--output-dir", folder / "results", "--events", folder / "no folder/events"}, tiny_model()),
            "none: cannot write events", 1);
    refused({"bench", "--output-dir", "/proc/results"}, "cannot write to the output folder '/proc/results'", 1);
}

BOOST_AUTO_TEST_CASE(somebody_elses_files_are_left_alone) {
    temporary_folder folder;
    std::filesystem::create_directories(folder / "checkpoints/layerwise");
    std::ofstream(folder / "checkpoints/layerwise/thesis.txt") << "text";
    refused(joined({"bench", "--methods", "layerwise", "--output-dir", folder.path().string()}, tiny_model({"--num-steps", "10"})), "did not write",
            1);
    BOOST_TEST(std::filesystem::exists(folder / "checkpoints/layerwise/thesis.txt"));
    auto const r = run_tool(joined({"train", "--method", "layerwise", "--dir", folder / "checkpoints/layerwise"}, tiny_model({"--num-steps", "10"})));
    BOOST_TEST(r.code == 1);
    BOOST_TEST(line_count(r.err) == 1u);
    BOOST_TEST(std::filesystem::exists(folder / "checkpoints/layerwise/thesis.txt"));
}

}  // namespace varve_test
