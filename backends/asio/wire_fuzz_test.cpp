#include "mutate.hpp"
#include "support.hpp"
#include "wire_messages.hpp"

#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size);

namespace {

using namespace varve_test;
using bytes = std::vector<std::uint8_t>;

void append(bytes& to, std::vector<std::byte> const& frame) {
    std::transform(frame.begin(), frame.end(), std::back_inserter(to), [](std::byte b) { return static_cast<std::uint8_t>(b); });
}

/// What a peer says from its first message on, one of each; `first` says who and how it is cut.
bytes conversation(wire::peer from, std::uint8_t first) {
    bytes out{first};
    wire::frame_writer writer;
    std::apply(
        [&](auto const&... m) {
            auto add = [&]<class Message>(Message const& message) {
                if (wire::sender_of(Message::type) != from) return;
                std::vector<std::byte> frame;
                writer.append(frame, message);
                append(out, frame);
            };
            (add(m), ...);
        },
        some_messages());
    return out;
}

std::vector<bytes> seeds() {
    std::vector<bytes> out;
    for (auto from : {wire::peer::trainer, wire::peer::monitor})
        for (std::uint8_t cut : {0, 1, 22, 23, 24, 127}) {
            auto const first = static_cast<std::uint8_t>(cut << 1 | (from == wire::peer::monitor ? 1 : 0));
            out.push_back(conversation(from, first));
            // One message alone, so that a change in it is not hidden behind an earlier one.
            std::apply(
                [&](auto const&... m) {
                    auto add = [&]<class Message>(Message const& message) {
                        if (wire::sender_of(Message::type) != from) return;
                        bytes one{first};
                        append(one, frame_of(message));
                        out.push_back(std::move(one));
                    };
                    (add(m), ...);
                },
                some_messages());
        }
    return out;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(wire_fuzz)

BOOST_AUTO_TEST_CASE(the_parser_takes_or_refuses_whatever_comes) {
    auto const corpus = seeds();
    for (auto const& seed : corpus) LLVMFuzzerTestOneInput(seed.data(), seed.size());
    std::mt19937_64 random(20260101);
    std::size_t const inputs = full() ? 5'000'000 : 300'000;
    for (std::size_t i = 0; i < inputs; ++i) {
        auto input = corpus[random() % corpus.size()];
        mutate(input, random, 1);
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    BOOST_TEST(inputs >= 300'000u);
}

BOOST_AUTO_TEST_CASE(noise_is_refused) {
    std::mt19937_64 random(7);
    for (int i = 0; i < 20'000; ++i) {
        bytes input(random() % 300);
        for (auto& b : input) b = static_cast<std::uint8_t>(random());
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
}

BOOST_AUTO_TEST_SUITE_END()
