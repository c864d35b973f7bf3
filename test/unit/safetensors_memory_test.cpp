#include "files.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <sys/resource.h>
#include <sys/wait.h>
#include <fstream>

#include "varve/format/safetensors.hpp"

namespace {

using namespace varve_test;

/// The constant: a string of 16 MiB as the parser keeps it, twice over, and what is left of the program.
constexpr std::uint64_t constant_bytes = 96u << 20;

/// Writes a hostile header of at most `size` bytes, made of `unit(i)` between `front` and `back`, and the data; returns the file's size.
template <class Unit>
std::uint64_t write_hostile(std::filesystem::path const& path, std::uint64_t size, std::string const& front, Unit unit, std::string const& back) {
    std::ofstream out(path, std::ios::binary);
    out.seekp(8);
    out << front;
    std::uint64_t length = front.size();
    for (std::uint64_t i = 0;; ++i) {
        std::string next = unit(i);
        if (length + next.size() + back.size() > size) break;
        out << next;
        length += next.size();
    }
    out << back;
    length += back.size();
    out.seekp(0);
    for (unsigned i = 0; i < 8; ++i) out.put(static_cast<char>(length >> 8 * i));
    return 8 + length;
}

/// How far a child's memory grows at its peak while it is refused the file; nothing if it is not refused.
std::uint64_t peak_growth_while_refused(std::filesystem::path const& path) {
    auto child = ::fork();
    if (child == 0) {
        auto peak = [] {
            rusage u{};
            ::getrusage(RUSAGE_SELF, &u);
            return static_cast<std::uint64_t>(u.ru_maxrss) << 10;
        };
        auto before = peak();
        auto fd = open_file(path);
        int refused = 0;
        varve::safetensors format;
        owned_state other;
        other.add("l", "model.other", varve::dtype::U8, {1});
        for (auto call : {std::function<void()>([&] { format.identify(fd.get()); }), std::function<void()>([&] { format.verify(fd.get(), 2); }),
                          std::function<void()>([&] { format.restore(fd.get(), other.state, {1, false, false, false}); })})
            try {
                call();
            } catch (varve::error const&) {
                ++refused;
            }
        ::_exit(refused == 3 ? static_cast<int>(std::min<std::uint64_t>((peak() - before) >> 20, 250)) : 255);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    BOOST_REQUIRE(WIFEXITED(status));
    BOOST_REQUIRE(WEXITSTATUS(status) != 255);
    return static_cast<std::uint64_t>(WEXITSTATUS(status)) << 20;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(safetensors_memory)

BOOST_AUTO_TEST_CASE(a_refused_file_costs_no_more_memory_than_its_size_plus_a_constant) {
    temporary_folder folder;
    auto path = folder.path() / "hostile.safetensors";
    std::uint64_t const size = varve_test::full() ? 100'000'000 : 40'000'000;
    auto expect_bounded = [&](char const* what, std::uint64_t file_bytes) {
        auto growth = peak_growth_while_refused(path);
        BOOST_TEST_MESSAGE(what << ": " << (growth >> 20) << " MiB for a file of " << (file_bytes >> 20) << " MiB");
        BOOST_TEST(growth <= file_bytes + constant_bytes, what << ": " << (growth >> 20) << " MiB");
    };
    auto many = [](std::string text) { return [text](std::uint64_t) { return text; }; };
    std::string const kilobyte(1000, 'x');
    std::string const ones = [] {
        std::string s;
        while (s.size() < 1000) s += "1,";
        return s;
    }();
    auto tensor = [](std::uint64_t i) { return (i > 0 ? ",\"" : "\"") + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})"; };
    auto pair = [](std::uint64_t i) { return (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":\"\""; };

    expect_bounded("whole tensors without digests", write_hostile(path, size, "{", tensor, "}"));
    expect_bounded("tensors and no end", write_hostile(path, size, "{", tensor, ""));
    expect_bounded("metadata without digests", write_hostile(path, size, "{\"__metadata__\":{", pair, "}}"));
    expect_bounded("one string", write_hostile(path, size, "{\"", many(kilobyte), "\":{}}"));
    expect_bounded("blanks", write_hostile(path, size, "{", many(std::string(1000, ' ')), ""));
    expect_bounded("one number", write_hostile(path, size, R"({"a":{"shape":[)", many(std::string(1000, '1')), "]}}"));
    expect_bounded("one shape", write_hostile(path, size, R"({"a":{"shape":[)", many(ones), "1]}}"));
    expect_bounded("brackets", write_hostile(path, size, "{\"a\":", many(std::string(1000, '[')), ""));
    expect_bounded("braces", write_hostile(path, size, "", many("{\"a\":"), ""));
}

BOOST_AUTO_TEST_SUITE_END()
