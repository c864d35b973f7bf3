#include "safetensors_files.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>

#include "varve/detail/safetensors_read.hpp"
#include "varve/format/safetensors.hpp"

namespace {

using namespace varve_test;
using varve::dtype;
using varve::errc;

/// A device whose copies happen as late as its rules allow: when a piece is given back. Its memory is the host's.
class late_device final : public varve::device_memory {
public:
    std::span<std::byte> borrow() override {
        std::lock_guard lock(mutex_);
        ++lent_;
        auto* memory = static_cast<std::byte*>(std::aligned_alloc(4096, piece_bytes));
        return {memory, piece_bytes};
    }
    void write(varve::tensor const& to, std::uint64_t offset_bytes, std::span<std::byte const> bytes) override {
        std::lock_guard lock(mutex_);
        pending_.push_back({&to, offset_bytes, bytes});
    }
    void give_back(std::span<std::byte> piece) noexcept override {
        std::lock_guard lock(mutex_);
        std::erase_if(pending_, [&](auto const& w) {
            if (w.bytes.data() < piece.data() || w.bytes.data() >= piece.data() + piece.size()) return false;
            varve::detail::scatter(*w.to, w.offset, w.bytes.size(), w.bytes.data());
            return true;
        });
        --lent_;
        std::free(piece.data());
    }
    void finish() override {}
    std::unique_ptr<reader> read(std::vector<varve::tensor const*>) override { throw std::logic_error("no test reads"); }

    bool is_quiet() const noexcept { return lent_ == 0 && pending_.empty(); }

private:
    struct late_write {
        varve::tensor const* to;
        std::uint64_t offset;
        std::span<std::byte const> bytes;
    };
    std::mutex mutex_;
    std::vector<late_write> pending_;
    int lent_ = 0;
};

}  // namespace

BOOST_FIXTURE_TEST_SUITE(safetensors, files)

BOOST_AUTO_TEST_CASE(the_layout_does_not_depend_on_the_step) {
    auto s = example();
    varve::safetensors format;
    auto img = format.lay_out(s.state);
    BOOST_TEST(img.header_bytes % varve::digest_chunk_bytes == 0u);
    BOOST_TEST(img.data_bytes() == s.state.size_bytes());
    std::vector<std::uint64_t> digests(varve::detail::chunk_count(img.data_bytes()), ~std::uint64_t{0});
    for (std::uint64_t step : {std::uint64_t{1}, ~std::uint64_t{0}})
        BOOST_TEST(format.header(s.state, img, {step, step, {{"k", std::string(4000, 'x')}}}, digests).size() == img.header_bytes);
}

BOOST_AUTO_TEST_CASE(layers_stand_in_order_and_every_tensor_is_aligned_for_its_dtype) {
    auto s = example();
    auto img = varve::safetensors{}.lay_out(s.state);
    std::uint64_t at = img.header_bytes;
    std::size_t layer = 0;
    std::size_t element = 8;
    bool tail = false;
    for (auto const& p : img.tensors) {
        auto const& t = s.state.layers[p.layer].tensors[p.tensor];
        BOOST_TEST(p.offset_bytes == at);
        BOOST_TEST(p.offset_bytes % element_bytes(t.type) == 0u);
        at += p.size_bytes;
        bool starts_tail = !tail && p.size_bytes % 8 != 0;
        if (starts_tail) tail = true;
        BOOST_TEST((p.size_bytes % 8 != 0) == tail);
        if (starts_tail || (!tail && p.layer > layer)) element = 8;
        if (!tail) BOOST_TEST(p.layer >= layer);
        BOOST_TEST(element_bytes(t.type) <= element);
        layer = p.layer;
        element = element_bytes(t.type);
    }
    BOOST_TEST(tail);
    BOOST_TEST(at == img.size_bytes);
}

BOOST_AUTO_TEST_CASE(what_was_written_is_identified_verified_and_restored_bit_for_bit) {
    auto s = example();
    auto const before = s.bytes();
    varve::commit_values const values{120, 7, {{"epoch", "3"}, {"note", "\"\x01\n\\ä"}}};
    auto fd = open(checkpoint_bytes(s.state, values));
    varve::safetensors format;
    auto identity = format.identify(fd.get());
    BOOST_TEST(identity.step == 120u);
    BOOST_TEST(identity.sequence == 7u);
    BOOST_TEST((identity.metadata == values.metadata));
    for (unsigned workers : {0u, 1u, 3u}) {
        format.verify(fd.get(), workers);
        for (bool verify_first : {false, true})
            for (bool drop_pages : {false, true}) {
                auto fresh = example(99);
                BOOST_TEST((fresh.bytes() != before));
                ::fsync(fd.get());
                if (drop_pages) ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
                format.expect_same_layout(fd.get(), fresh.state);
                auto const said = format.restore(fd.get(), fresh.state, {workers, true, verify_first, false});
                BOOST_TEST((fresh.bytes() == before));
                BOOST_TEST(said.step == 120u);
                BOOST_TEST(said.sequence == 7u);
                BOOST_TEST((said.metadata == values.metadata));
            }
    }
}

BOOST_AUTO_TEST_CASE(tensors_in_device_memory_are_restored_through_what_the_device_lends) {
    auto s = example();
    auto const good = checkpoint_bytes(s.state, {1, 1, {}});
    for (bool drop_pages : {false, true}) {
        auto fd = open(good);
        ::fsync(fd.get());
        if (drop_pages) ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
        auto fresh = example(99);
        for (auto& l : fresh.state.layers)
            for (auto& t : l.tensors)
                if (l.name != "run") t.memory = varve::memory_kind::device;
        late_device device;
        varve::restore_options options{.workers = 3, .device = &device};
        varve::safetensors{}.restore(fd.get(), fresh.state, options);
        BOOST_TEST((fresh.bytes() == s.bytes()));
        BOOST_TEST(device.is_quiet());
        BOOST_TEST((code_of([&] { varve::safetensors{}.restore(fd.get(), fresh.state, {}); }) == errc::unsupported));

        auto broken = good;
        broken.back() = static_cast<char>(broken.back() ^ 1);
        BOOST_TEST((code_of([&] { varve::safetensors{}.restore(open(broken).get(), fresh.state, options); }) == errc::not_whole));
        BOOST_TEST(device.is_quiet());
    }
}

BOOST_AUTO_TEST_CASE(the_same_state_gives_the_same_bytes) {
    auto a = example();
    auto b = example();
    BOOST_TEST((checkpoint_bytes(a.state, {1, 1, {}}) == checkpoint_bytes(b.state, {1, 1, {}})));
}

BOOST_AUTO_TEST_CASE(a_state_without_tensors_is_a_whole_checkpoint) {
    varve::state nothing;
    auto fd = open(checkpoint_bytes(nothing, {1, 1, {}}));
    varve::safetensors{}.verify(fd.get(), 2);
    varve::safetensors{}.restore(fd.get(), nothing, {});
}

BOOST_AUTO_TEST_CASE(tensors_with_strides_are_gathered_and_scattered_in_row_major_order) {
    owned_state a;
    auto& t = a.add("l", "model.t", dtype::F32, {300, 5, 200});
    t.strides = {1, 300 * 200, 300};  // some permutation of a dense tensor
    a.add("l", "model.same", dtype::F32, {300, 5, 200}, 9);
    auto& odd = a.add("l", "model.column", dtype::I16, {1, 50, 1});
    odd.strides = {7, 1, 3};  // dimensions of one element may have any stride
    auto fd = open(checkpoint_bytes(a.state, {1, 1, {}}));
    owned_state b;
    b.add("l", "model.t", dtype::F32, {300, 5, 200}, 5);
    b.add("l", "model.same", dtype::F32, {300, 5, 200}, 5).strides = {1000, 1, 5};
    b.add("l", "model.column", dtype::I16, {1, 50, 1}, 5);
    varve::safetensors{}.restore(fd.get(), b.state, {2, true, false, false});
    BOOST_TEST((a.bytes() == b.bytes()));
    auto const* base = static_cast<float const*>(a.state.layers[0].tensors[0].data);
    auto const* dense = static_cast<float const*>(b.state.layers[0].tensors[0].data);
    BOOST_TEST(std::memcmp(&base[7 + 2 * 60000 + 11 * 300], &dense[7 * 1000 + 2 * 200 + 11], 4) == 0);
    // A range that begins and ends inside of elements and rows.
    auto const whole = a.bytes();
    std::string part(9001, '\0');
    varve::detail::gather(a.state.layers[0].tensors[0], 1237, part.size(), reinterpret_cast<std::byte*>(part.data()));
    BOOST_TEST((part == whole.substr(1237, part.size())));
}

BOOST_AUTO_TEST_CASE(tied_names_are_stored_once_and_found_under_either_name) {
    owned_state a;
    a.add("embedding", "model.embedding.weight", dtype::F32, {4, 4}, 3);
    a.state.aliases["model.head.weight"] = "model.embedding.weight";
    auto fd = open(checkpoint_bytes(a.state, {1, 1, {}}));
    auto file = varve::detail::read_safetensors(fd.get());
    BOOST_TEST(file.tensors.size() == 1u);
    BOOST_TEST(file.metadata.at("varve.aliases") == R"({"model.head.weight":"model.embedding.weight"})");

    owned_state other_owner;
    other_owner.add("head", "model.head.weight", dtype::F32, {4, 4}, 8);
    other_owner.state.aliases["model.embedding.weight"] = "model.head.weight";
    varve::safetensors{}.restore(fd.get(), other_owner.state, {});
    BOOST_TEST((other_owner.bytes() == a.bytes()));

    owned_state no_aliases;
    no_aliases.add("head", "model.head.weight", dtype::F32, {4, 4}, 8);
    varve::safetensors{}.restore(fd.get(), no_aliases.state, {});
    BOOST_TEST((no_aliases.bytes() == a.bytes()));

    // A file of somebody who stored it under both names: the one that the state stores counts.
    owned_state twice;
    twice.add("l", "model.head.weight", dtype::F32, {4, 4}, 20);
    twice.add("l", "model.embedding.weight", dtype::F32, {4, 4}, 3);
    auto both = open(checkpoint_bytes(twice.state, {1, 1, {}}));
    a.clear();
    varve::safetensors{}.restore(both.get(), a.state, {});
    BOOST_TEST((a.bytes() == twice.bytes().substr(64)));
}

BOOST_AUTO_TEST_CASE(another_model_is_named_before_a_byte_changes) {
    auto s = example();
    auto fd = open(checkpoint_bytes(s.state, {1, 1, {}}));
    varve::safetensors format;
    auto expect = [&](auto change, std::string const& part) {
        auto other = example(50);
        change(other.state);
        auto const before = other.bytes();
        for (auto call : {std::function<void()>([&] { format.expect_same_layout(fd.get(), other.state); }),
                          std::function<void()>([&] { format.restore(fd.get(), other.state, {}); })}) {
            BOOST_TEST((code_of(call) == errc::mismatch));
            BOOST_TEST(line_of(call).find(part) != std::string::npos, line_of(call));
        }
        BOOST_TEST((other.bytes() == before));
    };
    expect([](auto& st) { st.layers[1].tensors[0].name = "model.other"; }, "model.linear.bias");
    expect([](auto& st) { st.layers[1].tensors.push_back({"model.more", dtype::F32, {0}, nullptr, {}, {}}); }, "lacks the tensor model.more");
    expect([](auto& st) { st.layers[1].tensors[0].shape = {1, 3}; }, "model.linear.bias is F32 [3], and the state's is F32 [1, 3]");
    expect([](auto& st) { st.layers[1].tensors[0].type = dtype::I32; }, "F32 [3], and the state's is I32 [3]");
}

BOOST_AUTO_TEST_CASE(model_only_leaves_everything_else_alone) {
    auto s = example();
    auto fd = open(checkpoint_bytes(s.state, {1, 1, {}}));
    owned_state other;
    for (auto const& l : s.state.layers)
        for (auto const& t : l.tensors)
            if (t.name.starts_with("model.")) other.add(l.name, t.name, t.type, t.shape, 77);
    other.add("run", "user.mine", dtype::U8, {8}, 5);
    auto const mine = other.bytes().substr(other.bytes().size() - 8);
    varve::safetensors{}.restore(fd.get(), other.state, {2, true, false, true});
    auto const after = other.bytes();
    BOOST_TEST((after.substr(after.size() - 8) == mine));
    BOOST_TEST((after.substr(0, 1100 * 1024 * 4) == s.bytes().substr(0, 1100 * 1024 * 4)));
}

BOOST_AUTO_TEST_CASE(metadata_that_does_not_fit_fails_before_anything_is_written) {
    auto s = example();
    varve::safetensors format;
    auto img = format.lay_out(s.state);
    std::vector<std::uint64_t> digests(varve::detail::chunk_count(img.data_bytes()));
    auto code = [&](varve::metadata_map const& m) { return code_of([&] { format.header(s.state, img, {1, 1, m}, digests); }); };
    BOOST_TEST((code({{"k", std::string(4096, 'x')}}) == errc::metadata_too_large));
    BOOST_TEST((code({{"k", std::string(1000, '\x01')}}) == errc::metadata_too_large));
    BOOST_TEST(!code({{"k", std::string(4000, 'x')}}));
    BOOST_TEST((code({{"varve.mine", "x"}}) == std::errc::invalid_argument));
    BOOST_TEST((code({{"k", "\xff"}}) == std::errc::invalid_argument));
    BOOST_TEST((code_of([&] { format.header(s.state, img, {1, 1, {}}, std::span(digests).first(1)); }) == std::errc::invalid_argument));
}

BOOST_AUTO_TEST_CASE(a_state_that_no_file_can_hold_is_refused) {
    auto code = [](auto change) {
        owned_state s;
        s.add("l", "a", dtype::F32, {2});
        s.add("l", "b", dtype::F32, {2});
        change(s.state);
        return code_of([&] { varve::safetensors{}.lay_out(s.state); });
    };
    BOOST_TEST((code([](auto& s) { s.layers[0].tensors[1].name = "a"; }) == std::errc::invalid_argument));
    BOOST_TEST((code([](auto& s) { s.layers[0].tensors[1].name = "\xc3("; }) == std::errc::invalid_argument));
    BOOST_TEST((code([](auto& s) { s.layers[0].tensors[1].name = "__metadata__"; }) == std::errc::invalid_argument));
    BOOST_TEST((code([](auto& s) { s.layers[0].tensors[1].shape = {-1}; }) == std::errc::invalid_argument));
    BOOST_TEST((code([](auto& s) { s.layers[0].tensors[1].shape = {INT64_MAX, INT64_MAX}; }) == std::errc::invalid_argument));
    BOOST_TEST((code([](auto& s) { s.aliases["c"] = "nothing"; }) == std::errc::invalid_argument));
    BOOST_TEST((code([](auto& s) { s.aliases["a"] = "b"; }) == std::errc::invalid_argument));
}

BOOST_AUTO_TEST_CASE(a_state_that_its_own_reader_would_refuse_is_refused) {
    auto tied = [](std::size_t names, std::size_t dimensions) {
        owned_state s;
        s.add("l", "model.a", dtype::F32, {2});
        for (std::size_t i = 0; i < names; ++i) s.state.aliases["model." + std::to_string(100'000 + i) + std::string(87, 'x')] = "model.a";
        s.add("l", "model.b", dtype::F32, std::vector<std::int64_t>(dimensions, 1));
        return s;
    };
    auto code = [](owned_state const& s) { return code_of([&] { varve::safetensors{}.lay_out(s.state); }); };
    auto most = tied(9000, 1024);
    BOOST_TEST(!code(most));
    auto fd = open(checkpoint_bytes(most.state, {1, 1, {}}));
    BOOST_TEST(!code_of([&] { varve::safetensors{}.restore(fd.get(), most.state, {}); }));
    BOOST_TEST((code(tied(10'000, 1)) == std::errc::invalid_argument));
    BOOST_TEST((code(tied(0, 1025)) == std::errc::invalid_argument));
    owned_state long_name;
    long_name.add("l", std::string(3u << 20, 'n'), dtype::F32, {1});
    BOOST_TEST((code(long_name) == std::errc::invalid_argument));
    varve::safetensors const roomy(64u << 20);
    BOOST_TEST(!code_of([&] { roomy.expect_fits({{"note", std::string(15u << 20, 'x')}}); }));
    BOOST_TEST((code_of([&] { roomy.expect_fits({{"note", std::string(17u << 20, 'x')}}); }) == std::errc::invalid_argument));
}

BOOST_AUTO_TEST_SUITE_END()
