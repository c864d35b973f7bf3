#include "safetensors_files.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <cstring>
#include <random>
#include <set>

#include "varve/detail/safetensors_read.hpp"
#include "varve/format/safetensors.hpp"

namespace {

using namespace varve_test;
using varve::dtype;
using varve::errc;

}  // namespace

BOOST_FIXTURE_TEST_SUITE(safetensors_broken, files)

BOOST_AUTO_TEST_CASE(a_flipped_bit_at_200_random_places_is_found_by_verify_and_by_restore) {
    auto s = example();
    auto const good = checkpoint_bytes(s.state, {120, 7, {{"epoch", "3"}}});
    write_file(folder.path() / "f", good);
    int fd = ::open((folder.path() / "f").c_str(), O_RDWR | O_CLOEXEC);
    std::mt19937_64 random(4711);
    std::vector<std::size_t> places;
    for (int i = 0; i < 120; ++i) places.push_back(random() % good.size());
    for (int i = 0; i < 80; ++i) places.push_back(random() % 6000);  // where the JSON is
    varve::safetensors format;
    for (auto place : places) {
        char broken = static_cast<char>(good[place] ^ (1 << random() % 8));
        BOOST_REQUIRE(::pwrite(fd, &broken, 1, static_cast<off_t>(place)) == 1);
        auto code = code_of([&] { format.verify(fd, 1); });
        BOOST_TEST((code == errc::not_whole || code == errc::malformed), "bit flipped at byte " << place);
        auto fresh = example(5);
        code = code_of([&] { format.restore(fd, fresh.state, {}); });
        BOOST_TEST((code == errc::not_whole || code == errc::malformed), "bit flipped at byte " << place);
        BOOST_REQUIRE(::pwrite(fd, &good[place], 1, static_cast<off_t>(place)) == 1);
    }
    format.verify(fd, 1);
    ::close(fd);
}

BOOST_AUTO_TEST_CASE(a_broken_granule_is_named_with_its_bytes_and_tensors) {
    auto s = example();
    auto bytes = checkpoint_bytes(s.state, {1, 1, {}});
    bytes.back() = static_cast<char>(bytes.back() ^ 1);
    auto fd = open(bytes);
    auto line = line_of([&] { varve::safetensors{}.verify(fd.get(), 2); });
    auto header = varve::safetensors{}.lay_out(s.state).header_bytes;
    auto range = "bytes " + std::to_string(header + (8u << 20)) + " to " + std::to_string(bytes.size());
    BOOST_TEST(line.find(range) != std::string::npos, line);
    BOOST_TEST(line.find("user.odd") != std::string::npos, line);
    BOOST_TEST(line.find("user.näme \"quoted\"\\\\x0a") != std::string::npos, line);
    BOOST_TEST(line.find("model.embedding.weight") == std::string::npos, line);
}

BOOST_AUTO_TEST_CASE(a_file_cut_anywhere_is_refused) {
    auto s = example();
    auto const good = checkpoint_bytes(s.state, {1, 1, {}});
    for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{8}, std::size_t{9}, std::size_t{65535}, std::size_t{65536},
                             std::size_t{65537}, good.size() / 2, good.size() - 1}) {
        auto fd = open(std::string_view(good).substr(0, size));
        BOOST_TEST((code_of([&] { varve::safetensors{}.identify(fd.get()); }) == errc::malformed));
    }
    auto longer = open(good + "x");
    BOOST_TEST((code_of([&] { varve::safetensors{}.identify(longer.get()); }) == errc::malformed));
}

BOOST_AUTO_TEST_CASE(a_file_without_both_digests_is_not_whole_but_restores_without_them) {
    auto fd = open(file_of(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "1234"));
    varve::safetensors format;
    BOOST_TEST((code_of([&] { format.identify(fd.get()); }) == errc::not_whole));
    BOOST_TEST((code_of([&] { format.verify(fd.get(), 1); }) == errc::not_whole));
    owned_state s;
    s.add("l", "a", dtype::U8, {4});
    BOOST_TEST((code_of([&] { format.restore(fd.get(), s.state, {}); }) == errc::not_whole));
    format.restore(fd.get(), s.state, {1, false, false, false});
    BOOST_TEST(s.bytes() == "1234");
}

BOOST_AUTO_TEST_CASE(what_the_format_allows_is_read) {
    auto read = [&](std::string_view json, std::string_view data) { return varve::detail::read_safetensors(open(file_of(json, data)).get()); };
    BOOST_TEST(read("{}", "").tensors.empty());
    BOOST_TEST(read("{  }\n\t\r ", "").tensors.empty());
    BOOST_TEST(read(R"({"__metadata__":{}})", "").metadata.empty());
    BOOST_TEST(read(R"({"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", "1234").tensors[0].shape.empty());
    BOOST_TEST(read(R"({"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}})", "").tensors[0].end == 0u);
    auto two = read(R"( {"b":{"data_offsets":[1,2],"shape":[1],"dtype":"U8"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})" + 1, "12");
    BOOST_TEST(two.tensors[0].name == "a");
    BOOST_TEST(two.tensors[1].name == "b");
    auto escaped = read(R"({"__metadata__":{"k\n":"é"},"a\u0000\\":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", "");
    BOOST_TEST(escaped.tensors[0].name == std::string("a\0\\", 3));
    BOOST_TEST(escaped.metadata.at("k\n") == "é");
}

BOOST_AUTO_TEST_CASE(hostile_headers_are_refused) {
    std::string const good = R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
    std::vector<std::pair<std::string, std::string>> hostile{
        {"", ""},
        {" {}", ""},
        {"[]", ""},
        {"\xef\xbb\xbf{}", ""},
        {"{", ""},
        {"{}}", ""},
        {"{}{}", ""},
        {"{}x", ""},
        {std::string("{}\0", 3), ""},
        {std::string("{}\0garbage", 10), ""},
        {"{} 1", ""},
        {"{" + good + ",}", "1"},
        {"{" + good + "}", ""},
        {"{" + good + "}", "12"},
        {"{}", "1"},
        {"{" + good + "," + good + "}", "1"},
        {R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "12"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})", "123"},
        {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", "123"},
        {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", "12"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1e0]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551617]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":["0","1"]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1,null],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", ""},
        {R"({"a":{"dtype":"U8","shape":[4294967297,4294967295,4294967297],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}})", ""},
        {R"({"a":{"dtype":"F64","shape":[18446744073709551615],"data_offsets":[0,0]}})", ""},
        {R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}})", "1234"},
        {R"({"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", "1"},
        {R"({"a":{"shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1]}})", "1"},
        {R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"strides":[1],"data_offsets":[0,1]}})", "1"},
        {R"({"a":{"dtype":"U8","shape":[1],"more":{"dtype":"U8"},"data_offsets":[0,1]}})", "1"},
        {R"({"a":null})", ""},
        {R"({"a":[]})", ""},
        {R"({"a":"text"})", ""},
        {R"({"a":1})", ""},
        {R"({"a":{}})", ""},
        {R"({"__metadata__":null})", ""},
        {R"({"__metadata__":[]})", ""},
        {R"({"__metadata__":"x"})", ""},
        {R"({"__metadata__":{"k":1}})", ""},
        {R"({"__metadata__":{"k":null}})", ""},
        {R"({"__metadata__":{"k":{"a":"b"}}})", ""},
        {R"({"__metadata__":{"k":["a"]}})", ""},
        {R"({"__metadata__":{"k":"a","k":"a"}})", ""},
        {R"({"__metadata__":{},"__metadata__":{}})", ""},
        {"{\"\xff\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", "1"},
        {"{\"__metadata__\":{\"k\":\"\xc0\x80\"}}", ""},
        {"{\"__metadata__\":{\"k\":\"\xed\xa0\x80\"}}", ""},
        {R"({"__metadata__":{"k":"\ud800"}})", ""},
        {"{\"__metadata__\":{\"k\":\"line\nbreak\"}}", ""},
        {R"({'a':1})", ""},
        {R"({"a" {"dtype":"U8"}})", ""},
        {"{/* */}", ""},
        {"{\"a\":NaN}", ""},
        {"{" + std::string(100'000, '['), ""},
        {"{\"a\":" + std::string(100'000, '['), ""},
        {"{" + good + "}" + std::string(100'000, '}'), "1"},
    };
    std::string nested;
    for (int i = 0; i < 100'000; ++i) nested += "{\"a\":";
    hostile.push_back({nested, ""});
    std::string ranks = R"({"a":{"dtype":"U8","shape":[1)";
    for (int i = 0; i < 2000; ++i) ranks += ",1";
    hostile.push_back({ranks + R"(],"data_offsets":[0,1]}})", "1"});
    std::size_t number = 0;
    for (auto const& [json, data] : hostile) {
        auto fd = open(file_of(json, data));
        for (auto call : {std::function<void()>([&] { varve::safetensors{}.identify(fd.get()); }),
                          std::function<void()>([&] { varve::detail::read_safetensors(fd.get()); })})
            BOOST_TEST((code_of(call) == errc::malformed), "hostile header " << number << ": " << json.substr(0, 100));
        ++number;
    }
}

BOOST_AUTO_TEST_CASE(a_claimed_header_length_is_checked_against_the_file) {
    for (std::uint64_t claim : {std::uint64_t{3}, std::uint64_t{100'000'000}, std::uint64_t{100'000'001}, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
        auto bytes = file_of("{}");
        std::memcpy(bytes.data(), &claim, 8);
        BOOST_TEST((code_of([&] { varve::safetensors{}.identify(open(bytes).get()); }) == errc::malformed));
    }
}

BOOST_AUTO_TEST_CASE(what_is_no_regular_file_is_refused) {
    auto fd = open_file(folder.path());
    BOOST_TEST((code_of([&] { varve::safetensors{}.identify(fd.get()); }) == errc::malformed));
}

BOOST_AUTO_TEST_SUITE_END()
