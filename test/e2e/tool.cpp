#include "tool.hpp"

#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "comes_to.hpp"
#include "support.hpp"

namespace varve_test {

namespace fs = std::filesystem;

namespace {

fs::path temporary_file() {
    auto pattern = (fs::temp_directory_path() / "varve-e2e-XXXXXX").string();
    int const fd = ::mkstemp(pattern.data());
    if (fd < 0) throw std::runtime_error("no temporary file");
    ::close(fd);
    return pattern;
}

}  // namespace

running_tool::running_tool(std::vector<std::string> const& args) : out_(temporary_file()), err_(temporary_file()) {
    char const* tool = std::getenv("VARVE_TOOL");
    if (!tool) throw std::runtime_error("VARVE_TOOL does not say where the command is; run the tests with meson");
    std::vector<std::string> words{tool};
    words.insert(words.end(), args.begin(), args.end());
    auto given = [&](char const* option) { return std::find(args.begin(), args.end(), option) != args.end(); };
    if (!args.empty() && (args[0] == "bench" || args[0] == "train") && !given("--list") && !given("--device") && tool_has_gpu())
        words.insert(words.begin() + 2, {"--device", "cpu"});
    std::vector<char*> argv;
    for (auto& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("cannot fork");
    if (pid_ == 0) {
        ::setpgid(0, 0);
        ::dup2(::open("/dev/null", O_RDONLY), STDIN_FILENO);
        ::dup2(::open(out_.c_str(), O_WRONLY | O_TRUNC), STDOUT_FILENO);
        ::dup2(::open(err_.c_str(), O_WRONLY | O_TRUNC), STDERR_FILENO);
        ::execv(argv[0], argv.data());
        ::_exit(127);
    }
}

running_tool::~running_tool() {
    if (!ended_) {
        signal(SIGKILL);
        collect(0);
    }
    fs::remove(out_);
    fs::remove(err_);
}

void running_tool::signal(int number) const {
    if (!ended_) ::kill(pid_, number);
}

bool running_tool::collect(int options) {
    if (!ended_) ended_ = ::waitpid(pid_, &status_, options) == pid_;
    return ended_;
}

bool running_tool::ends_within(std::chrono::milliseconds time) {
    return varve_test::comes_to([&] { return collect(WNOHANG); }, time, std::chrono::milliseconds(2));
}

bool running_tool::comes_to(std::function<bool()> const& condition) {
    while (!condition())
        if (ends_within(std::chrono::milliseconds(50))) return false;
    return true;
}

bool running_tool::comes_to_write_events(fs::path const& file) {
    return comes_to([&] { return fs::exists(file) && read_events(file).size() >= 2; });
}

outcome running_tool::wait() {
    collect(0);
    return {WIFSIGNALED(status_) ? 128 + WTERMSIG(status_) : WEXITSTATUS(status_), read_text(out_), read_text(err_)};
}

outcome run_tool(std::vector<std::string> const& args) { return running_tool(args).wait(); }

bool runs_here(std::string const& method, std::string const& device) {
    return run_tool({"bench", "--device", device, "--methods", method, "--dry-run"}).code == 0;
}

bool tool_has_gpu() {
    static bool const has = [] {
        auto const list = run_tool({"bench", "--list"}).out;
        auto const at = list.find("\npinned+async+null ");
        return at != std::string::npos && list.substr(at + 1, list.find('\n', at + 1) - at).find("cannot run here") == std::string::npos;
    }();
    return has;
}

bool have_tool_gpu() {
    if (!tool_has_gpu()) skip("the command has no GPU here");
    return tool_has_gpu();
}

temporary_folder::temporary_folder() {
    auto pattern = (fs::temp_directory_path() / "varve-e2e-XXXXXX").string();
    if (!::mkdtemp(pattern.data())) throw std::runtime_error("no temporary folder");
    path_ = pattern;
}

temporary_folder::~temporary_folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
}

std::vector<nlohmann::json> read_events(fs::path const& file, std::uintmax_t from) {
    std::vector<nlohmann::json> events;
    std::ifstream in(file, std::ios::binary);
    in.seekg(static_cast<std::streamoff>(from));
    for (std::string line; std::getline(in, line);)
        if (auto event = nlohmann::json::parse(line, nullptr, false); !event.is_discarded()) events.push_back(std::move(event));
    return events;
}

std::vector<std::uint64_t> steps_of(fs::path const& file, std::string const& event, std::uintmax_t from) {
    std::vector<std::uint64_t> steps;
    for (auto const& e : read_events(file, from))
        if (e.at("event") == event) steps.push_back(e.at("step"));
    return steps;
}

std::uint64_t largest(std::vector<std::uint64_t> const& steps) { return steps.empty() ? 0 : *std::max_element(steps.begin(), steps.end()); }

std::map<std::uint64_t, double> losses_in(fs::path const& file) {
    std::map<std::uint64_t, double> losses;
    for (auto const& e : read_events(file)) {
        if (e.at("event") != "step") continue;
        auto const [known, is_new] = losses.emplace(e.at("step"), e.at("loss"));
        BOOST_TEST(known->second == e.at("loss").get<double>(), "the loss was " << known->second << " at first: " << e.dump());
    }
    return losses;
}

std::string read_text(fs::path const& file) {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

nlohmann::json read_json(fs::path const& file) { return nlohmann::json::parse(read_text(file)); }

std::vector<std::uint64_t> stored_steps(fs::path const& store) {
    std::vector<std::uint64_t> steps;
    for (auto const& entry : fs::directory_iterator(store))
        if (auto name = entry.path().filename().string(); name.starts_with("step-")) steps.push_back(std::stoull(name.substr(5, 12)));
    std::sort(steps.begin(), steps.end());
    return steps;
}

std::string newest_file(fs::path const& store) {
    fs::path newest;
    for (auto const& entry : fs::directory_iterator(store))
        if (entry.path().filename().string().starts_with("step-")) newest = std::max(newest, entry.path());
    return newest.string();
}

void expect_whole(fs::path const& store) {
    auto const verified = run_tool({"verify", store.string()});
    BOOST_TEST(verified.code == 0, verified.out << verified.err);
}

std::vector<std::string> joined(std::vector<std::string> first, std::vector<std::string> const& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

std::vector<std::string> tiny_model(std::vector<std::string> const& more) {
    return joined({"--d-model", "128", "--num-layers", "2", "--nhead", "4", "--vocab-size", "1000", "--dim-feedforward", "256", "--num-samples", "50",
                   "--seq-len", "32", "--batch-size", "4", "--max-async", "2"},
                  more);
}

std::vector<std::string> every_step_run(std::string const& store, std::string const& events, std::uint64_t steps,
                                        std::vector<std::string> const& more, std::string const& method) {
    std::vector<std::string> const run{"train", "--method", method, "--dir", store, "--events", events, "--num-steps", std::to_string(steps)};
    std::vector<std::string> const model{"--d-model", "32", "--num-layers", "2", "--nhead", "4", "--vocab-size", "2000", "--dim-feedforward", "64"};
    std::vector<std::string> const data{"--num-samples", "64", "--seq-len", "16", "--batch-size", "2", "--checkpoint-freq", "1"};
    return joined(joined(joined(run, model), data), more);
}

std::vector<std::string> runnable(std::vector<std::string> const& methods) {
    auto const list = "\n" + run_tool({"bench", "--list"}).out;
    std::vector<std::string> out;
    for (auto const& m : methods) {
        auto const at = list.find("\n" + m + " ");
        if (at != std::string::npos && list.substr(at + 1, list.find('\n', at + 1) - at).find("cannot run here") == std::string::npos)
            out.push_back(m);
    }
    return out;
}

bool has_update(std::string const& name) { return run_tool({"bench", "--dry-run", "--device", "cpu", "--update", name}).code == 0; }

std::size_t line_count(std::string const& text) { return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n')); }

}  // namespace varve_test
