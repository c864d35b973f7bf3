#include "files.hpp"
#include "python.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <sys/stat.h>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <streambuf>
#include <thread>

#include "varve/detail/store_folder.hpp"

#include "commands.hpp"
#include "element_difference.hpp"
#include "errors.hpp"
#include "progress.hpp"
#include "store_reader.hpp"
#include "table.hpp"

namespace {

using namespace varve_test;
using varve::dtype;
namespace tool = varve::tool;

struct outcome {
    int code = -1;
    std::string out;
    std::string err;
};

using command = int (*)(std::vector<std::string> const&, std::ostream&, std::ostream&);

/// As the command's main() does it.
outcome run(command call, std::vector<std::string> const& args) {
    outcome o;
    std::ostringstream out, err;
    try {
        o.code = call(args, out, err);
    } catch (tool::usage_error const& e) {
        o.code = 2;
        err << e.what() << '\n';
    } catch (varve::error const& e) {
        o.code = 1;
        err << e.what() << '\n';
    }
    o.out = out.str();
    o.err = err.str();
    return o;
}

/// What another thread writes, to be read meanwhile.
class watched_text : public std::streambuf {
public:
    std::string so_far() const {
        std::lock_guard lock(mutex_);
        return text_;
    }
    bool comes_to_hold(std::string const& part) {
        std::unique_lock lock(mutex_);
        return changed_.wait_for(lock, std::chrono::seconds(30), [&] { return text_.find(part) != std::string::npos; });
    }

private:
    int_type overflow(int_type c) override {
        char const one = traits_type::to_char_type(c);
        return xsputn(&one, 1) == 1 ? c : traits_type::eof();
    }
    std::streamsize xsputn(char const* from, std::streamsize count) override {
        std::lock_guard lock(mutex_);
        text_.append(from, static_cast<std::size_t>(count));
        changed_.notify_all();
        return count;
    }

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::string text_;
};

bool has(std::string const& text, std::string const& part) { return text.find(part) != std::string::npos; }
auto lines(std::string const& text) { return std::count(text.begin(), text.end(), '\n'); }

struct store {
    temporary_folder folder;
    owned_state state;

    store() {
        state.add("a", "model.weight", dtype::F32, {100, 300}, 1);
        state.add("a", "optimizer.weight.exp_avg", dtype::F32, {100, 300}, 2);
        state.add("run", "user.na\xc3\xafve\nname", dtype::I64, {}, 3);
        state.state.aliases["model.tied"] = "model.weight";
        write_file(folder.path() / ".varve", "{\"varve_store\": 1, \"made_by\": \"test\"}\n");
        write_file(folder.path() / ".partial-1", "anything");
    }

    std::string add(std::uint64_t step, std::uint64_t sequence) {
        auto path = folder.path() / varve::detail::checkpoint_name(step, ".safetensors");
        write_file(path, checkpoint_bytes(state.state, {step, sequence, {{"epoch", std::to_string(step)}}}));
        return path.string();
    }
    std::string dir() const { return folder.path().string(); }
    std::string file(std::string const& name) const { return (folder.path() / name).string(); }

    static void flip(std::string const& path, std::size_t at) {
        auto bytes = read_file(path);
        bytes[at] = static_cast<char>(bytes[at] ^ 4);
        write_file(path, bytes);
    }
};

}  // namespace

BOOST_FIXTURE_TEST_SUITE(files, store)

BOOST_AUTO_TEST_CASE(ls_lists_newest_first_by_sequence) {
    add(110, 1), add(120, 2);
    auto back = add(50, 3);
    auto o = run(tool::ls, {dir()});
    BOOST_TEST(o.code == 0);
    BOOST_TEST(lines(o.out) == 4);
    BOOST_TEST(o.out.find("step-000000000050") < o.out.find("step-000000000120"));
    BOOST_TEST(o.out.find("step-000000000120") < o.out.find("step-000000000110"));
    BOOST_TEST(!has(o.out, "partial"));
    BOOST_TEST(run(tool::ls, {dir(), "--newest", "--path"}).out == back + "\n");
    auto json = nlohmann::json::parse(run(tool::ls, {"--json", dir()}).out);
    BOOST_TEST(json["checkpoints"].size() == 3u);
    BOOST_TEST(json["checkpoints"][0]["step"] == 50);
    BOOST_TEST(json["checkpoints"][0]["path"] == back);
}

BOOST_AUTO_TEST_CASE(ls_of_what_is_no_store_fails_in_one_line) {
    temporary_folder other;
    auto o = run(tool::ls, {other.path().string()});
    BOOST_TEST(o.code == 1);
    BOOST_TEST(lines(o.err) == 1);
    BOOST_TEST(has(o.err, other.path().string()));
    BOOST_TEST(run(tool::ls, {dir()}).code == 0);
    BOOST_TEST(run(tool::ls, {dir(), "--newest"}).code == 1);
    BOOST_TEST(run(tool::ls, {dir() + "/absent"}).code == 1);
}

BOOST_AUTO_TEST_CASE(wrong_use_is_one_line_and_exit_code_2) {
    auto all = {std::pair<command, std::vector<std::string>>{tool::ls, {dir()}},
                {tool::inspect, {"f"}},
                {tool::verify, {"f"}},
                {tool::diff, {"a", "b"}},
                {tool::restore, {dir()}}};
    for (auto const& [call, args] : all) {
        auto with = [&](std::string const& more) {
            auto longer = args;
            longer.push_back(more);
            return longer;
        };
        for (auto const& wrong : {with("--nonsense"), with("one-too-many"), std::vector<std::string>{}}) {
            auto o = run(call, wrong);
            BOOST_TEST(o.code == 2);
            BOOST_TEST(lines(o.err) == 1, o.err);
            BOOST_TEST(o.out == "");
        }
        auto help = run(call, {"--help"});
        BOOST_TEST(help.code == 0);
        BOOST_TEST(has(help.out, "Usage: varve "));
    }
    BOOST_TEST(run(tool::restore, {dir(), "--output", "x.bin"}).code == 2);
    BOOST_TEST(run(tool::restore, {dir()}).code == 2);
    BOOST_TEST(run(tool::restore, {dir(), "--output", "x.pt", "--step", "-1"}).code == 2);
}

BOOST_AUTO_TEST_CASE(inspect_shows_names_raw_and_control_characters_escaped) {
    auto path = add(120, 7);
    auto o = run(tool::inspect, {path});
    BOOST_TEST(o.code == 0);
    BOOST_TEST(has(o.out, "user.na\xc3\xafve\\x0aname"));
    BOOST_TEST(has(o.out, "[100, 300]"));
    BOOST_TEST(has(o.out, "epoch"));
    auto json = nlohmann::json::parse(run(tool::inspect, {path, "--json"}).out);
    BOOST_TEST(json["tensors"].size() == 3u);
    BOOST_TEST(json["tensors"][2]["name"] == "user.na\xc3\xafve\nname");
    BOOST_TEST(json["metadata"]["varve.sequence"] == "7");
    auto folder_instead = run(tool::inspect, {dir()});
    BOOST_TEST(folder_instead.code == 1);
    BOOST_TEST(lines(folder_instead.err) == 1);
}

BOOST_AUTO_TEST_CASE(inspect_reads_files_of_others) {
    write_file(folder.path() / "theirs", file_of(R"({"__metadata__":{"format":"pt"},"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", "ab"));
    BOOST_TEST(run(tool::inspect, {file("theirs")}).code == 0);
    BOOST_TEST(run(tool::verify, {file("theirs"), "--structure"}).code == 0);
    auto o = run(tool::verify, {file("theirs")});
    BOOST_TEST(o.code == 1);
    BOOST_TEST(has(o.out, "varve.digests"));
}

BOOST_AUTO_TEST_CASE(verify_says_one_line_for_each_broken_file) {
    BOOST_TEST(run(tool::verify, {dir()}).code == 1);  // no checkpoint at all
    auto good = add(1, 1), broken = add(2, 2), cut = add(3, 3);
    BOOST_TEST(run(tool::verify, {dir()}).code == 0);
    flip(broken, 65536 + 130'000);
    write_file(cut, read_file(cut).substr(0, 70'000));
    auto o = run(tool::verify, {dir()});
    BOOST_TEST(o.code == 1);
    BOOST_TEST(lines(o.out) == 3);
    BOOST_TEST(has(o.out, good + ": whole, step 1"));
    BOOST_TEST(has(o.out, broken + ": BROKEN: not a whole checkpoint: bytes 65536 to "));
    BOOST_TEST(has(o.out, "optimizer.weight.exp_avg"));
    auto json = nlohmann::json::parse(run(tool::verify, {dir(), "--json"}).out);
    BOOST_TEST(json["whole"] == false);
    BOOST_TEST(json["files"].size() == 3u);
    // By content: neither name nor folder matter.
    std::filesystem::copy_file(good, folder.path() / "other.name");
    BOOST_TEST(run(tool::verify, {file("other.name")}).code == 0);
    BOOST_TEST(run(tool::verify, {broken, "--structure"}).code == 0);
    BOOST_TEST(run(tool::verify, {cut, "--structure"}).code == 1);
    BOOST_TEST(run(tool::verify, {file("absent")}).code == 1);
}

BOOST_AUTO_TEST_CASE(a_fifo_is_refused_without_waiting) {
    BOOST_REQUIRE(::mkfifo(file("fifo").c_str(), 0600) == 0);
    BOOST_TEST(run(tool::verify, {file("fifo")}).code == 1);
}

BOOST_AUTO_TEST_CASE(diff_names_what_differs_and_by_how_much) {
    auto a = add(1, 1);
    auto same = add(2, 2);
    BOOST_TEST(run(tool::diff, {a, same}).code == 0);
    BOOST_TEST(has(run(tool::diff, {a, same}).out, "same bits: 3 tensors"));
    auto* step = static_cast<std::int64_t*>(state.state.layers[1].tensors[0].data);
    *step = 17;
    auto before = add(3, 3);
    *step = 20;
    auto after = add(4, 4);
    auto o = run(tool::diff, {before, after});
    BOOST_TEST(o.code == 1);
    BOOST_TEST(has(o.out, "1 of 3 tensors"));
    BOOST_TEST(has(o.out, "largest difference 3 in user.na"));
    state.state.layers[0].tensors[0].shape = {300, 100};
    state.state.layers[0].tensors[1].name = "optimizer.other";
    auto other = add(5, 5);
    o = run(tool::diff, {after, other});
    BOOST_TEST(o.code == 1);
    BOOST_TEST(has(o.out, "another form: model.weight"));
    BOOST_TEST(has(o.out, "only in A: optimizer.weight.exp_avg"));
    BOOST_TEST(has(o.out, "only in B: optimizer.other"));
}

BOOST_AUTO_TEST_CASE(differences_are_those_of_the_values) {
    auto largest = [](dtype type, auto a, auto b) {
        tool::element_difference d;
        d.add(type, std::as_bytes(std::span(&a, 1)), std::as_bytes(std::span(&b, 1)));
        return d.largest;
    };
    BOOST_TEST(largest(dtype::F32, 1.0f, 1.5f) == 0.5L);
    BOOST_TEST(largest(dtype::F16, std::uint16_t{0x3c00}, std::uint16_t{0xc000}) == 3.0L);
    BOOST_TEST(largest(dtype::BF16, std::uint16_t{0x3f80}, std::uint16_t{0x4000}) == 1.0L);
    BOOST_TEST(largest(dtype::F8_E4M3, std::uint8_t{0x7e}, std::uint8_t{0x00}) == 448.0L);
    BOOST_TEST(largest(dtype::F8_E5M2, std::uint8_t{0x7b}, std::uint8_t{0x00}) == 57344.0L);
    BOOST_TEST(largest(dtype::I64, std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max()) > 1e19L);
    tool::element_difference d;
    std::array<float, 2> const a{NAN, -0.0f}, b{1.0f, 0.0f};
    d.add(dtype::F32, std::as_bytes(std::span(a)), std::as_bytes(std::span(b)));
    BOOST_TEST(d.elements == 2u);
    BOOST_TEST(d.not_numbers == 1u);
    BOOST_TEST(d.largest == 0.0L);
}

BOOST_AUTO_TEST_CASE(restore_keeps_tensors_aliases_and_the_users_metadata) {
    add(1, 1);
    auto newest = add(2, 2);
    auto to = file("out.safetensors");
    auto o = run(tool::restore, {dir(), "--output", to});
    BOOST_TEST(o.code == 0, o.err);
    BOOST_TEST(run(tool::diff, {newest, to}).code == 0);
    BOOST_TEST(run(tool::verify, {to}).code == 0);
    auto metadata = nlohmann::json::parse(run(tool::inspect, {to, "--json"}).out)["metadata"];
    BOOST_TEST(metadata["epoch"] == "2");
    BOOST_TEST(metadata["varve.step"] == "2");
    BOOST_TEST(metadata["varve.aliases"] == R"({"model.tied":"model.weight"})");
    BOOST_TEST(run(tool::restore, {dir(), "--step", "1", "--output", to}).code == 0);
    BOOST_TEST(nlohmann::json::parse(run(tool::inspect, {to, "--json"}).out)["metadata"]["varve.step"] == "1");
    auto const missing = run(tool::restore, {dir(), "--step", "9", "--output", to});
    BOOST_TEST(missing.code == 1);
    BOOST_TEST(has(missing.err, "there are 1, 2"), missing.err);
    BOOST_TEST(run(tool::restore, {dir(), "--model-only", "--output", to}).code == 0);
    auto tensors = nlohmann::json::parse(run(tool::inspect, {to, "--json"}).out)["tensors"];
    BOOST_TEST(tensors.size() == 1u);
    BOOST_TEST(tensors[0]["name"] == "model.weight");
}

BOOST_AUTO_TEST_CASE(restore_takes_the_checkpoint_before_a_broken_one) {
    auto good = add(1, 1), broken = add(2, 2);
    flip(broken, 65536 + 9);
    auto to = file("out.safetensors");
    auto o = run(tool::restore, {dir(), "--output", to});
    BOOST_TEST(o.code == 0);
    BOOST_TEST(has(o.err, broken));
    BOOST_TEST(run(tool::diff, {good, to}).code == 0);
    // A file that is named is that one or none, and nothing appears under the name.
    std::filesystem::remove(to);
    BOOST_TEST(run(tool::restore, {broken, "--output", to}).code == 1);
    BOOST_TEST(!std::filesystem::exists(to));
    auto const unchecked = run(tool::restore, {broken, "--no-verify", "--output", to});
    BOOST_TEST(unchecked.code == 0);
    BOOST_TEST(has(unchecked.err, "not checked: the bytes of " + broken), unchecked.err);
    BOOST_TEST(run(tool::diff, {broken, to}).code == 0);
}

BOOST_AUTO_TEST_CASE(a_file_that_cannot_be_looked_at_is_not_passed_over) {
    tool::listed_store listed;
    listed.broken.push_back({"d/step-000000000006.safetensors", "malformed"});
    tool::expect_all_read(listed);
    listed.broken.push_back({"d/step-000000000007.safetensors", "Permission denied", false});
    tool::expect_all_read(listed, 6);
    for (auto step : {std::optional<std::uint64_t>(), std::optional<std::uint64_t>(7)})
        BOOST_CHECK_EXCEPTION(tool::expect_all_read(listed, step), varve::error,
                              [](auto const& e) { return has(e.what(), "step-000000000007.safetensors: cannot be read"); });
}

BOOST_AUTO_TEST_CASE(a_link_to_nothing_is_none_that_a_writer_let_go) {
    add(1, 1);
    std::filesystem::create_symlink(file("nowhere"), file("step-000000000002.safetensors"));
    auto const verified = run(tool::verify, {dir()});
    BOOST_TEST(verified.code == 1);
    BOOST_TEST(has(verified.out, "step-000000000002.safetensors: BROKEN: "), verified.out);
    auto const restored = run(tool::restore, {dir(), "--output", file("out.safetensors")});
    BOOST_TEST(restored.code == 1);
    BOOST_TEST(has(restored.err, "step-000000000002.safetensors: cannot be read, and may be the newest"), restored.err);
}

BOOST_AUTO_TEST_CASE(restore_takes_files_of_others_as_they_are) {
    auto json = R"({"__metadata__":{"long":")" + std::string(9000, 'x') + R"("},"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})";
    write_file(folder.path() / "theirs", file_of(json, "ab"));
    auto to = file("out.safetensors");
    BOOST_TEST(run(tool::restore, {file("theirs"), "--output", to}).code == 1);
    BOOST_TEST(run(tool::restore, {file("theirs"), "--no-verify", "--output", to}).code == 0);
    auto const no_model = run(tool::restore, {file("theirs"), "--no-verify", "--model-only", "--output", file("model.safetensors")});
    BOOST_TEST(no_model.code == 1);
    BOOST_TEST(has(no_model.err, "no tensor whose name begins with model."), no_model.err);
    BOOST_TEST(!std::filesystem::exists(file("model.safetensors")));
    BOOST_TEST(run(tool::diff, {file("theirs"), to}).code == 0);
    BOOST_TEST(run(tool::verify, {to}).code == 0);
}

BOOST_AUTO_TEST_CASE(restore_writes_what_torch_load_and_a_python_trainer_take) {
    owned_state trained;
    trained.add("0", "model.0.weight", dtype::F32, {3, 5}, 1);  // 60 bytes: stands at the end of the file, in front of the bias in the list
    trained.add("0", "model.0.bias", dtype::F32, {4}, 2);
    std::vector<std::unique_ptr<double>> options;
    for (std::string p : {"0.weight", "0.bias"}) {
        auto const shape = p == "0.weight" ? std::vector<std::int64_t>{3, 5} : std::vector<std::int64_t>{4};
        trained.add("0", "optimizer." + p + ".exp_avg", dtype::F32, shape, 3);
        trained.add("0", "optimizer." + p + ".exp_avg_sq", dtype::F32, shape, 4);
        *static_cast<std::int64_t*>(trained.add("0", "optimizer." + p + ".step", dtype::I64, {}).data) = 120;
    }
    for (auto const& [name, value] :
         {std::pair{"lr", 0.25}, {"betas.0", 0.9}, {"betas.1", 0.999}, {"eps", 1e-8}, {"weight_decay", 0.0}, {"amsgrad", 0.0}})
        *static_cast<double*>(trained.add("run", std::string("optimizer.group.0.") + name, dtype::F64, {}).data) = value;
    trained.add("run", "rng.cpu", dtype::U8, {40}, 5);
    *static_cast<std::int64_t*>(trained.add("run", "user.epoch", dtype::I64, {}).data) = 3;
    trained.state.aliases["model.tied"] = "model.0.weight";
    write_file(file("from.safetensors"), checkpoint_bytes(trained.state, {120, 7, {{"note", "kept"}}}));

    auto o = run(tool::restore, {file("from.safetensors"), "--output", file("to.pt")});
    if (o.code == 1 && has(o.err, "LibTorch")) {
        BOOST_TEST(lines(o.err) == 1);
        BOOST_TEST(!std::filesystem::exists(file("to.pt")));
        return varve_test::skip("built without LibTorch");
    }
    BOOST_TEST(o.code == 0, o.err);
    BOOST_TEST(run(tool::verify, {file("to.pt")}).code == 0);
    BOOST_TEST(has(run(tool::diff, {file("from.safetensors"), file("to.pt")}).out, "same bits: 16 tensors"));
    BOOST_TEST(run(tool::restore, {file("to.pt"), "--output", file("back.safetensors")}).code == 0);
    BOOST_TEST(run(tool::diff, {file("from.safetensors"), file("back.safetensors")}).code == 0);
    BOOST_TEST(nlohmann::json::parse(run(tool::inspect, {file("back.safetensors"), "--json"}).out)["metadata"]["note"] == "kept");
    BOOST_TEST(run(tool::restore, {file("from.safetensors"), "--model-only", "--output", file("model.pt")}).code == 0);
    flip(file("to.pt"), read_file(file("to.pt")).size() / 2);
    BOOST_TEST(run(tool::verify, {file("to.pt")}).code == 1);
    flip(file("to.pt"), read_file(file("to.pt")).size() / 2);

    auto interpreter = find_python();
    if (!interpreter) return;
    BOOST_TEST(run_python(*interpreter, folder.path(), R"(
import torch
from safetensors.torch import load_file
tensors = load_file("from.safetensors")
c = torch.load("to.pt", weights_only=True)
def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
assert set(c["model"]) == {"0.weight", "0.bias", "tied"}, c["model"].keys()
assert same(c["model"]["0.weight"], tensors["model.0.weight"]) and same(c["model"]["tied"], tensors["model.0.weight"])
assert c["step"] == 120 and c["user"]["epoch"] == 3
params = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(4))]
adam = torch.optim.Adam(params)
adam.load_state_dict(c["optimizer"])
assert adam.param_groups[0]["lr"] == 0.25
for p, name in zip(params, ("0.weight", "0.bias")):
    assert same(adam.state[p]["exp_avg"], tensors[f"optimizer.{name}.exp_avg"]) and adam.state[p]["step"] == 120
assert set(torch.load("model.pt", weights_only=True)["model"]) == {"0.weight", "0.bias", "tied"}
)"));
}

BOOST_AUTO_TEST_CASE(columns_stand_below_each_other) {
    tool::table t({"n\xc3\xa4me", ">size"});
    t.add({"a", "1"});
    t.add({"longer name", "100"});
    std::ostringstream out;
    out << t;
    BOOST_TEST(out.str() == "n\xc3\xa4me         size\na               1\nlonger name   100\n");
}

BOOST_AUTO_TEST_CASE(reading_shows_how_far_it_is) {
    temporary_folder folder;
    auto const path = folder.path() / "f";
    write_file(path, std::string(3'000'000, 'x'));
    using namespace std::chrono_literals;
    // Waits until that is shown; with nothing to wait for, a round of drawing and the next one.
    auto shown = [&](bool terminal, std::uint64_t total, std::chrono::milliseconds quiet, std::string const& awaited = {}) {
        watched_text text;
        std::ostream err(&text);
        {
            tool::reading_progress progress(err, "f", total, terminal, quiet);
            BOOST_TEST(read_file(path).size() == 3'000'000u);
            if (awaited.empty())
                std::this_thread::sleep_for(500ms);
            else
                BOOST_TEST(text.comes_to_hold(awaited), text.so_far());
        }
        return text.so_far();
    };
    BOOST_TEST(shown(true, 3'000'000, 10min) == "");
    auto const plain = shown(false, 3'000'000, 200ms, "3.0 MB of 3.0 MB\n");
    BOOST_TEST(plain.find('\r') == std::string::npos, plain);
    BOOST_TEST(shown(true, 3'000'000, 0ms, "f  3.0 MB of 3.0 MB").ends_with("\r\033[K"));
    auto const alone = shown(true, 0, 0ms, "f  3.0 MB");
    BOOST_TEST(alone.find(" of ") == std::string::npos, alone);
}

BOOST_AUTO_TEST_SUITE_END()
