#include "files.hpp"
#include "python.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include "varve/detail/safetensors_read.hpp"
#include "varve/format/safetensors.hpp"

namespace {

using namespace varve_test;
using varve::dtype;

}  // namespace

BOOST_AUTO_TEST_SUITE(safetensors_python)

BOOST_AUTO_TEST_CASE(python_opens_every_checkpoint_as_it_is) {
    auto interpreter = find_python();
    if (!interpreter) return;
    temporary_folder folder;
    owned_state s;
    for (std::size_t i = 0; i < varve::dtype_count; ++i) {
        auto type = static_cast<dtype>(i);
        if (type == dtype::BOOL) continue;
        s.add("l", "model." + std::string(name(type)), type, {2, 3}, static_cast<std::uint32_t>(i));
    }
    s.add("l", "model.empty", dtype::F32, {0, 3});
    s.add("l", "model.näme", dtype::U8, {});
    s.add("big", "model.big", dtype::F32, {1000, 1500}, 3);
    s.add("run", "user.odd", dtype::U8, {13});
    s.state.aliases["model.tied"] = "model.big";
    write_file(folder.path() / "ours.safetensors", checkpoint_bytes(s.state, {120, 7, {{"epoch", "3"}}}));
    for (auto const& l : s.state.layers)
        for (auto const& t : l.tensors)
            write_file(folder.path() / (t.name + ".raw"), {static_cast<char const*>(t.data), static_cast<std::size_t>(t.size_bytes())});
    BOOST_TEST(run_python(*interpreter, folder.path(), R"(
import glob, torch
from safetensors import safe_open
from safetensors.torch import load_file
tensors = load_file("ours.safetensors")
assert sorted(tensors) == sorted(f[:-4] for f in glob.glob("*.raw")), sorted(tensors)
for name, t in tensors.items():
    raw = open(name + ".raw", "rb").read()
    got = bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist()) if t.numel() else b""
    assert got == raw, name
assert tensors["model.big"].shape == (1000, 1500) and tensors["model.big"].dtype == torch.float32
with safe_open("ours.safetensors", "pt") as f:
    m = f.metadata()
assert m["varve.step"] == "120" and m["varve.sequence"] == "7" and m["epoch"] == "3", m
)"));
}

BOOST_AUTO_TEST_CASE(what_python_wrote_is_restored) {
    auto interpreter = find_python();
    if (!interpreter) return;
    temporary_folder folder;
    BOOST_REQUIRE(run_python(*interpreter, folder.path(), R"(
import torch
from safetensors.torch import save_file
save_file({"model.a": torch.arange(10, dtype=torch.float32).reshape(2, 5), "model.b": torch.arange(3, dtype=torch.int16),
           "model.half": torch.ones(7, dtype=torch.bfloat16), "model.scalar": torch.tensor(4, dtype=torch.int64),
           "model.empty": torch.empty(0, 2), "model.flag": torch.tensor([True, False, True])}, "theirs.safetensors", {"epoch": "3"})
)"));
    auto fd = open_file(folder.path() / "theirs.safetensors");
    BOOST_TEST(varve::detail::read_safetensors(fd.get()).metadata.at("epoch") == "3");
    owned_state s;
    s.add("l", "model.a", dtype::F32, {2, 5});
    s.add("l", "model.b", dtype::I16, {3});
    s.add("l", "model.half", dtype::BF16, {7});
    s.add("l", "model.scalar", dtype::I64, {});
    s.add("l", "model.empty", dtype::F32, {0, 2});
    s.add("l", "model.flag", dtype::BOOL, {3});
    varve::safetensors{}.restore(fd.get(), s.state, {1, false, false, false});
    auto const& tensors = s.state.layers[0].tensors;
    BOOST_TEST(static_cast<float const*>(tensors[0].data)[9] == 9.0f);
    BOOST_TEST(static_cast<std::int16_t const*>(tensors[1].data)[2] == 2);
    BOOST_TEST(static_cast<std::uint16_t const*>(tensors[2].data)[6] == 0x3f80);
    BOOST_TEST(*static_cast<std::int64_t const*>(tensors[3].data) == 4);
    BOOST_TEST(static_cast<std::uint8_t const*>(tensors[5].data)[2] == 1);
}

BOOST_AUTO_TEST_SUITE_END()
