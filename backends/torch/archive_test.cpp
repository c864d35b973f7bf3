#include <torch/torch.h>

#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.hpp"
#include "models.hpp"
#include "record_archive.hpp"
#include "shell.hpp"
#include "support.hpp"
#include "varve/torch/archive.hpp"
#include "varve/torch/training_state.hpp"

using namespace varve_test;
using varve::libtorch::archive;
using varve::libtorch::archive_reader;
using varve::libtorch::training_state;

namespace {

/// A file in memory.
class memory_file {
public:
    explicit memory_file(std::string_view bytes) : fd_(::memfd_create("archive", MFD_CLOEXEC)) { put(0, bytes); }
    ~memory_file() { ::close(fd_); }
    memory_file(memory_file const&) = delete;
    memory_file& operator=(memory_file const&) = delete;
    int fd() const { return fd_; }
    void put(std::size_t at, std::string_view bytes) {
        if (::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(at)) != static_cast<ssize_t>(bytes.size()))
            throw std::runtime_error("pwrite");
    }

private:
    int fd_;
};

/// A device that nothing is to be read from.
struct unread_device final : varve::device_memory {
    struct empty final : reader {
        std::span<std::byte const> next() override { return {}; }
    };
    std::span<std::byte> borrow() override { throw std::logic_error("nothing is restored"); }
    void write(varve::tensor const&, std::uint64_t, std::span<std::byte const>) override {}
    void give_back(std::span<std::byte>) noexcept override {}
    void finish() override {}
    std::unique_ptr<reader> read(std::vector<varve::tensor const*> from) override {
        BOOST_TEST(from.empty());
        return std::make_unique<empty>();
    }
};

std::string streamed(training_state& training, varve::commit_values const& values = {3, 7, {{"note", "a \"b\""}}}) {
    for (std::size_t l = 0; l < training.state().layers.size(); ++l) training.state().refresh(l);
    text_stream out;
    archive(training).stream(training.state(), values, out);
    return out.text;
}

template <class Model>
struct trained {
    explicit trained(make_optimizer const& make, int steps = 3, std::uint64_t seed = 5) {
        torch::manual_seed(seed);
        model = std::make_unique<Model>();
        optimizer = make(unique_parameters(*model));
        training = std::make_unique<training_state>(*model, *optimizer);
        training->add_user("epoch", epoch);
        training->add_user("best", best);
        training->add_user("seen", seen);
        for (int k = 1; k <= steps; ++k) best = train_step(*model, *optimizer, k);
        epoch = steps == 0 ? 0 : std::int64_t(1) << 40;
        seen.fill_(steps);
    }
    std::unique_ptr<Model> model;
    std::unique_ptr<torch::optim::Optimizer> optimizer;
    std::unique_ptr<training_state> training;
    std::int64_t epoch = 0;
    double best = 0;
    torch::Tensor seen = torch::zeros({2, 3}, torch::kByte);
};

/// The error's code; also that its message is one line.
template <class Call>
std::error_code code_of(Call call) {
    try {
        call();
    } catch (varve::error const& e) {
        BOOST_TEST(std::string(e.what()).find('\n') == std::string::npos);
        return e.code();
    }
    return {};
}

std::optional<std::string> python() {
    char const* path = std::getenv("VARVE_TEST_PYTHON");
    if (path && *path && shell("'" + std::string(path) + "' -c 'import torch' 2>/dev/null") == 0) return path;
    varve_test::skip("VARVE_TEST_PYTHON names no Python with torch");
    return std::nullopt;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(torch_archive)

BOOST_AUTO_TEST_CASE(a_checkpoint_restores_bit_for_bit_into_fresh_objects) {
    for (auto const& which : optimizers())
        for (int steps : {0, 3}) BOOST_TEST_CONTEXT(which.name << " at " << steps) {
                trained<odd_model> from(which.make, steps);
                auto const saved = contents(from.training->state());
                memory_file file(streamed(*from.training));
                archive const format(*from.training);
                auto identity = format.identify(file.fd());
                BOOST_TEST(identity.step == 3u);
                BOOST_TEST(identity.sequence == 7u);
                BOOST_TEST(identity.metadata.at("note") == "a \"b\"");
                format.verify(file.fd(), 1);
                for (bool check : {true, false}) {
                    trained<odd_model> to(which.make, 2, 77);
                    format.expect_same_layout(file.fd(), to.training->state());
                    auto const said = format.restore(file.fd(), to.training->state(), {.check_digests = check, .verify_first = check});
                    BOOST_TEST(said.step == (check ? identity.step : 0u));
                    BOOST_TEST((said.metadata == (check ? identity.metadata : varve::metadata_map{})));
                    to.training->state().restored();
                    BOOST_TEST((contents(to.training->state()) == saved));
                    BOOST_TEST(to.epoch == from.epoch);
                    BOOST_TEST(train_step(*to.model, *to.optimizer, 4) == train_step(*from.model, *from.optimizer, 4));
                    put_back(from.training->state(), saved);
                }
            }
}

BOOST_AUTO_TEST_CASE(of_momentum_that_is_not_there_yet_nothing_is_read) {
    struct scaled : torch::nn::Module {
        scaled() {
            weight = register_parameter("weight", torch::ones({4}));
            scale = register_parameter("scale", torch::tensor(2.f));
        }
        torch::Tensor weight, scale;
    } from, to;
    auto const options = torch::optim::SGDOptions(0.1).momentum(0.5);
    torch::optim::SGD optimizer(from.parameters(), options), other(to.parameters(), options);
    training_state training(from, optimizer), fresh(to, other);
    from.weight.sum().backward();
    optimizer.step();
    (to.weight.sum() * to.scale).backward();
    other.step();
    for (std::size_t l = 0; l < training.state().layers.size(); ++l) training.state().refresh(l);
    // As on a GPU, whose memory cannot be read here.
    std::size_t unreadable = 0;
    for (auto& l : training.state().layers)
        for (auto& t : l.tensors)
            if (t.name == "optimizer.scale.momentum_buffer") {
                t.memory = varve::memory_kind::device;
                t.data = nullptr;
                ++unreadable;
            }
    BOOST_TEST_REQUIRE(unreadable == 1u);
    text_stream out;
    archive(training, std::make_shared<unread_device>()).stream(training.state(), {3, 7, {}}, out);
    memory_file file(out.text);
    archive_reader().restore(file.fd(), fresh.state(), {});
    fresh.state().restored();
    BOOST_TEST(torch::equal(to.weight, from.weight));
    for (int step = 1; step <= 2; ++step)
        for (auto* m : {&from, &to}) {
            auto& o = m == &from ? optimizer : other;
            o.zero_grad();
            (m->weight.sum() * m->scale).backward();
            o.step();
        }
    BOOST_TEST(torch::equal(to.scale, from.scale));
}

BOOST_AUTO_TEST_CASE(only_the_model_is_restored_on_request) {
    auto const make = optimizers()[0].make;
    trained<odd_model> from(make), to(make, 2, 77);
    memory_file file(streamed(*from.training));
    auto const before = contents(to.training->state());
    archive_reader().restore(file.fd(), to.training->state(), {.model_only = true});
    to.training->state().restored();
    auto const saved = contents(from.training->state()), after = contents(to.training->state());
    for (std::size_t i = 0; i < after.size(); ++i) BOOST_TEST((after[i] == (after[i].first.starts_with("model.") ? saved[i] : before[i])));
}

BOOST_AUTO_TEST_CASE(a_checkpoint_of_another_model_or_optimizer_is_a_mismatch_and_changes_nothing) {
    auto const all = optimizers();
    trained<odd_model> from(all[0].make);
    memory_file file(streamed(*from.training));
    archive_reader const reader;
    auto expect_mismatch = [&](auto& other) {
        auto const before = contents(other.training->state());
        BOOST_TEST(code_of([&] { reader.expect_same_layout(file.fd(), other.training->state()); }) == varve::errc::mismatch);
        BOOST_TEST(code_of([&] { reader.restore(file.fd(), other.training->state(), {}); }) == varve::errc::mismatch);
        BOOST_TEST((contents(other.training->state()) == before));
    };
    trained<small_transformer> model(all[0].make);
    expect_mismatch(model);
    trained<odd_model> optimizer(all[5].make);
    expect_mismatch(optimizer);
}

BOOST_AUTO_TEST_CASE(a_flipped_bit_anywhere_is_found) {
    trained<odd_model> from(optimizers()[1].make);
    auto const bytes = streamed(*from.training);
    memory_file file(bytes);
    archive_reader const reader;
    std::mt19937_64 random(1);
    auto flipped = [&](std::size_t at, unsigned bit) {
        char const changed = static_cast<char>(bytes[at] ^ (1 << bit));
        file.put(at, {&changed, 1});
        auto verified = code_of([&] { reader.verify(file.fd(), 1); });
        auto restored = code_of([&] { reader.restore(file.fd(), from.training->state(), {}); });
        file.put(at, {&bytes[at], 1});
        BOOST_TEST_CONTEXT("bit " << bit << " of byte " << at << " of " << bytes.size()) {
            BOOST_TEST((verified == varve::errc::not_whole || verified == varve::errc::malformed));
            BOOST_TEST((restored == varve::errc::not_whole || restored == varve::errc::malformed));
        }
    };
    for (int i = 0; i < 200; ++i) flipped(random() % bytes.size(), static_cast<unsigned>(random() % 8));
    // Every byte of what is not under the digest.
    auto const tail = bytes.rfind("PK\x03\x04");
    for (std::size_t at = tail; at < bytes.size(); at += varve_test::full() ? 1 : 3) flipped(at, static_cast<unsigned>(at % 8));
    reader.verify(file.fd(), 1);
}

BOOST_AUTO_TEST_CASE(a_file_that_is_cut_short_or_longer_is_refused) {
    trained<odd_model> from(optimizers()[0].make);
    auto const bytes = streamed(*from.training);
    archive_reader const reader;
    std::mt19937_64 random(2);
    auto refused = [&](std::string_view what) {
        memory_file file(what);
        auto code = code_of([&] { reader.identify(file.fd()); });
        return code == varve::errc::malformed || code == varve::errc::not_whole;
    };
    for (int i = 0; i < 50; ++i) BOOST_TEST(refused(std::string_view(bytes).substr(0, random() % bytes.size())));
    for (std::size_t n = 0; n < 100; ++n) BOOST_TEST(refused(std::string_view(bytes).substr(0, n)));
    BOOST_TEST(refused(bytes + '\0'));
    BOOST_TEST(refused(std::string(100'000, '\0')));
    BOOST_TEST(refused(std::string(100'000, '\xff')));
}

BOOST_AUTO_TEST_CASE(hostile_records_are_refused) {
    trained<odd_model> from(optimizers()[0].make, 0);
    auto restoring = [&](std::string const& index) {
        memory_file file(archive_with({{"data/0", "12345678"}, {"varve/tensors", index}}));
        return code_of([&] { archive_reader().restore(file.fd(), from.training->state(), {}); });
    };
    using varve::errc;
    for (auto const* index : {"", "{}", "[", "[1]", "[[]]", R"([["a","F32",[2],3]])", R"([["a","F99",[2],""]])", R"([["a","F32",[-1],""]])",
                              R"([["a","F32",[1e300],""]])", R"([["model.frozen","F32",[12],"data/9"]])", R"([["model.frozen","F32",[12],"=00"]])",
                              R"([["model.frozen","U8",[16],"varve/digest"]])", R"([["a","F32",[1000000],""]])",
                              R"([["a","I64",[],"data/0"],["b","I64",[],"data/0"]])", R"([["a","F32",[9223372036854775807,9],""]])"})
        BOOST_TEST(restoring(index) == errc::malformed, index);
    // Refused before they cost a parser much more than their size.
    struct rusage before{}, after{};
    ::getrusage(RUSAGE_SELF, &before);
    std::string const deep(15u << 20, '[');
    BOOST_TEST(restoring(deep) == errc::malformed);
    memory_file with_deep(archive_with({{"varve/step", "1"}, {"varve/sequence", "1"}, {"varve/metadata", deep}}));
    BOOST_TEST(code_of([&] { archive_reader().identify(with_deep.fd()); }) == errc::malformed);
    ::getrusage(RUSAGE_SELF, &after);
    BOOST_TEST(after.ru_maxrss - before.ru_maxrss < 400'000);  // kB; it was 1.3 GB
    BOOST_TEST(restoring("[]") == errc::mismatch);
    BOOST_TEST(restoring(R"([["user.epoch","I64",[],"=0000000000000000"],["user.epoch","I64",[],"=0000000000000000"]])") == errc::mismatch);
    memory_file without(archive_with({{"varve/step", "1"}}));
    BOOST_TEST(code_of([&] { archive_reader().identify(without.fd()); }) == errc::not_whole);
    memory_file odd(archive_with({{"varve/step", "-1"}}));
    BOOST_TEST(code_of([&] { archive_reader().identify(odd.fd()); }) == errc::malformed);
    memory_file twice(archive_with({{"varve/step", "1"}, {"varve/step", "2"}}));
    BOOST_TEST(code_of([&] { archive_reader().identify(twice.fd()); }) == errc::malformed);
}

BOOST_AUTO_TEST_CASE(metadata_that_is_varves_or_not_utf8_is_refused) {
    trained<odd_model> from(optimizers()[0].make, 0);
    auto const invalid = std::make_error_code(std::errc::invalid_argument);
    BOOST_TEST(code_of([&] { streamed(*from.training, {1, 1, {{"varve.step", "2"}}}); }) == invalid);
    BOOST_TEST(code_of([&] { streamed(*from.training, {1, 1, {{"a", "\xff"}}}); }) == invalid);
}

BOOST_AUTO_TEST_CASE(metadata_that_the_reader_would_refuse_is_not_written) {
    trained<odd_model> from(optimizers()[0].make, 0);
    text_stream out;
    varve::commit_values const values{1, 1, {{"a", std::string(16u << 20, 'x')}}};
    BOOST_TEST(code_of([&] { archive(*from.training).stream(from.training->state(), values, out); }) ==
               std::make_error_code(std::errc::invalid_argument));
    BOOST_TEST(out.text.empty());
}

BOOST_AUTO_TEST_CASE(python_loads_model_and_optimizer_as_they_are) {
    auto interpreter = python();
    if (!interpreter) return;
    temporary_folder folder;
    auto check = [&](char const* name, std::size_t which, std::string const& optimizer) {
        trained<odd_model> from(optimizers()[which].make);
        write_file(folder.path() / "ours.pt", streamed(*from.training));
        for (auto const& [tensor, bytes] : contents(from.training->state()))
            write_file(folder.path() / (tensor + ".raw"), {reinterpret_cast<char const*>(bytes.data()), bytes.size()});
        write_file(folder.path() / "next.txt", std::to_string(train_step(*from.model, *from.optimizer, 4)));
        std::string program = R"(
import torch, torch.nn as nn, zipfile, pathlib
class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('offset', torch.zeros(3))
class Tied(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.weight = shared
        self.bias = nn.Parameter(torch.zeros(20))
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.norm, self.shifts = nn.Embedding(20, 12), nn.Linear(12, 12), nn.BatchNorm1d(12), Shift()
        self.tied = Tied(self.embedding.weight)
        self.strided, self.unused = nn.Parameter(torch.zeros(5, 12)), nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(12), requires_grad=False)
m = Odd()
names = ['strided', 'unused', 'frozen', 'embedding.weight', 'linear.weight', 'linear.bias', 'norm.weight', 'norm.bias', 'tied.bias']
assert [n for n, _ in m.named_parameters()] == names, [n for n, _ in m.named_parameters()]
o = OPTIMIZER
z = torch.load('ours.pt', weights_only=True)
assert z['step'] == 3 and z['user']['epoch'] == 1 << 40 and isinstance(z['user']['best'], float) and z['user']['seen'].tolist() == [[3] * 3] * 2, z['user']
assert zipfile.ZipFile('ours.pt').testzip() is None
def same(name, tensor):
    raw = pathlib.Path(name + '.raw').read_bytes()
    assert tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist() == list(raw), name
assert list(z['model']) == list(m.state_dict()), (list(z['model']), list(m.state_dict()))
assert z['model']['tied.weight'].data_ptr() == z['model']['embedding.weight'].data_ptr()
m.load_state_dict(z['model'])
o.load_state_dict(z['optimizer'])
for n, t in m.state_dict().items():
    if n != 'tied.weight': same('model.' + n, t)
assert set(z['optimizer']['param_groups'][0]) == set(o.state_dict()['param_groups'][0]), z['optimizer']['param_groups']
for key, value in type(o)(m.parameters(), lr=0.1).state_dict()['param_groups'][0].items():
    assert type(o.param_groups[0][key]) is type(value) or key in ('weight_decay', 'dampening', 'momentum', 'params'), key
count = 0
for name, p in m.named_parameters():
    for key, t in o.state[p].items():
        if key == 'step':
            assert t.dtype == torch.float32 and t.shape == () and int(t) == int.from_bytes(pathlib.Path('optimizer.' + name + '.step.raw').read_bytes(), 'little')
        else:
            same('optimizer.' + name + '.' + key, t)
        count += 1
assert count >= EXPECTED, count
torch.set_rng_state(z['rng']['cpu'])
same('rng.cpu', torch.get_rng_state())
import torch.nn.functional as F
tokens = (torch.arange(16) * 3 + 4) % 20
x = m.norm(m.linear(m.embedding(tokens)) + m.frozen)
mixed = x + x @ m.strided.t() @ m.strided
loss = F.cross_entropy(mixed @ m.tied.weight.t() + m.tied.bias, (tokens + 1) % 20)
assert abs(loss.item() - float(open('next.txt').read())) < 1e-5, loss.item()
o.zero_grad()
loss.backward()
o.step()
mapped = torch.load('ours.pt', weights_only=True, mmap=True)
assert torch.equal(mapped['model']['linear.weight'], z['model']['linear.weight'])
)";
        auto replace = [&](std::string const& what, std::string const& with) { program.replace(program.find(what), what.size(), with); };
        replace("OPTIMIZER", optimizer);
        replace("EXPECTED", which < 4 ? "27" : which == 4 ? "0" : "7");
        write_file(folder.path() / "program.py", program);
        auto command = "cd '" + folder.path().string() + "' && '" + *interpreter + "' program.py";
        BOOST_TEST(shell(command) == 0, name);
    };
    check("adam", 0, "torch.optim.Adam(m.parameters())");
    check("adam amsgrad", 1, "torch.optim.Adam(m.parameters(), amsgrad=True)");
    check("adamw", 2, "torch.optim.AdamW(m.parameters())");
    check("sgd", 4, "torch.optim.SGD(m.parameters(), lr=1.0)");
    check("sgd momentum", 6, "torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.5)");
}

BOOST_AUTO_TEST_CASE(python_reads_every_dtype) {
    auto interpreter = python();
    if (!interpreter) return;
    temporary_folder folder;
    struct nothing : torch::nn::Module {
        nothing() { weight = register_parameter("weight", torch::ones({2})); }
        torch::Tensor weight;
    } model;
    torch::optim::SGD optimizer(model.parameters(), 0.1);
    training_state training(model, optimizer);
    std::vector<std::pair<std::string, c10::ScalarType>> const types{{"bool", torch::kBool},
                                                                     {"uint8", torch::kByte},
                                                                     {"int8", torch::kChar},
                                                                     {"int16", torch::kShort},
                                                                     {"float16", torch::kHalf},
                                                                     {"bfloat16", torch::kBFloat16},
                                                                     {"int32", torch::kInt},
                                                                     {"float32", torch::kFloat},
                                                                     {"float64", torch::kDouble},
                                                                     {"int64", torch::kLong},
                                                                     {"complex64", torch::kComplexFloat}};
    for (auto const& [name, type] : types) training.add_user(name, torch::tensor({{1, 0, 1}, {1, 1, 0}}).to(type));
    training.add_user("empty", torch::zeros({0, 3}));
    // LibTorch 1.13 has no such tensors: these are the state's own.
    std::vector<std::uint8_t> raw(64, 0x38);
    auto& run = training.state().layers.back().tensors;
    for (auto [name, type] : {std::pair{"uint16", varve::dtype::U16}, std::pair{"uint32", varve::dtype::U32}, std::pair{"uint64", varve::dtype::U64},
                              std::pair{"float8_e5m2", varve::dtype::F8_E5M2}, std::pair{"float8_e4m3fn", varve::dtype::F8_E4M3}})
        run.push_back({std::string("user.") + name, type, {2, 2}, raw.data(), {}});
    write_file(folder.path() / "ours.pt", streamed(training));
    write_file(folder.path() / "program.py", R"(
import torch
z = torch.load('ours.pt', weights_only=True)['user']
for name, t in z.items():
    if name == 'empty':
        assert t.shape == (0, 3)
    else:
        assert t.dtype == getattr(torch, name), name
        if t.shape == (2, 3): assert (t.real if t.is_complex() else t).to(torch.int64).tolist() == [[1, 0, 1], [1, 1, 0]], (name, t)
        else: assert t.shape == (2, 2) and t.view(torch.uint8).unique().tolist() == [0x38], (name, t)
assert len(z) == 17, len(z)
)");
    auto command = "cd '" + folder.path().string() + "' && '" + *interpreter + "' program.py 2>&1";
    BOOST_TEST(shell(command) == 0);
}

BOOST_AUTO_TEST_SUITE_END()
