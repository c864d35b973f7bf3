#include "support.hpp"
#include "wire_messages.hpp"

#include <boost/test/unit_test.hpp>

#include <string>

namespace {

using namespace varve_test;

/// What a message is refused with, or nothing.
template <class F>
std::string refusal_of(F&& f) {
    try {
        f();
        return {};
    } catch (varve::error const& e) {
        BOOST_TEST(e.code() == varve::errc::malformed);
        return e.what();
    }
}

bool says(std::string const& line, std::string const& part) { return line.find(part) != std::string::npos; }

/// The payload of a frame with a u32 set at that place of it.
std::vector<std::byte> payload_with(std::vector<std::byte> frame, std::size_t at, std::uint32_t value) {
    frame.erase(frame.begin(), frame.begin() + wire::header_bytes);
    for (unsigned i = 0; i < 4; ++i) frame[at + i] = static_cast<std::byte>(value >> 8 * i);
    return frame;
}

template <class F>
void for_each_message(F&& f) {
    std::apply([&](auto const&... m) { (f(m), ...); }, some_messages());
}

}  // namespace

BOOST_AUTO_TEST_SUITE(wire_format)

BOOST_AUTO_TEST_CASE(every_message_comes_back_as_it_was_sent) {
    int seen = 0;
    for_each_message([&]<class Message>(Message const& m) {
        auto const frame = frame_of(m);
        auto const header = wire::frame_reader(wire::sender_of(Message::type)).accept(head_of(frame));
        BOOST_TEST((header.type == Message::type));
        BOOST_TEST(header.payload_bytes == frame.size() - wire::header_bytes);
        auto const again = wire::decode<Message>(std::span(frame).subspan(wire::header_bytes));
        BOOST_TEST(frame_of(again) == frame, "type " << static_cast<int>(Message::type));
        wire::decode(header.type, std::span(frame).subspan(wire::header_bytes), [&](auto const& any) {
            if constexpr (std::same_as<std::remove_cvref_t<decltype(any)>, Message>) ++seen;
        });
    });
    BOOST_TEST(seen == 22);
    auto const frame = frame_of(some_hello());
    auto const h = wire::decode<wire::hello>(std::span(frame).subspan(wire::header_bytes));
    BOOST_TEST(h.layers.at(0).tensors.at(0).name == "model.weight");
    BOOST_TEST((h.layers.at(0).tensors.at(0).type == varve::dtype::BF16));
    BOOST_TEST((h.layers.at(0).tensors.at(0).shape == std::vector<std::int64_t>{3, 4}));
    BOOST_TEST((h.busy == varve::when_busy::replace));
    BOOST_TEST(h.region_bytes.at(1) == 4u << 20);
}

BOOST_AUTO_TEST_CASE(the_bytes_of_a_frame_are_those_that_the_readme_says) {
    auto const frame = frame_of(wire::durable{0x0102030405060708, 9}, 3);
    std::vector<int> const expected{'V', 'R', 'V', '1', 68, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0,
                                    0,   0,   0,   0,   8,  7, 6, 5, 4,  3, 2, 1, 9, 0, 0, 0, 0, 0, 0, 0};
    BOOST_REQUIRE(frame.size() == expected.size());
    for (std::size_t i = 0; i < frame.size(); ++i) BOOST_TEST(static_cast<int>(frame[i]) == expected[i], "byte " << i);
}

BOOST_AUTO_TEST_CASE(a_message_that_ends_early_or_late_is_refused) {
    for_each_message([&]<class Message>(Message const& m) {
        auto frame = frame_of(m);
        auto const whole = frame.size() - wire::header_bytes;
        bool const open_ended = std::same_as<Message, wire::block_data> || std::same_as<Message, wire::image_data>;
        for (std::size_t n = 0; n < (open_ended ? whole - 5 : whole); ++n)
            BOOST_TEST(!refusal_of([&] { wire::decode<Message>(std::span(frame).subspan(wire::header_bytes, n)); }).empty(),
                       "type " << static_cast<int>(Message::type) << " cut to " << n);
        frame.push_back(std::byte{0});
        if (!open_ended)
            BOOST_TEST(says(refusal_of([&] { wire::decode<Message>(std::span(frame).subspan(wire::header_bytes)); }), "1 bytes too many"));
    });
}

BOOST_AUTO_TEST_CASE(a_frame_of_another_protocol_or_direction_is_refused) {
    auto frame = frame_of(wire::begin{1, 2});
    BOOST_TEST(says(refusal_of([&] { wire::frame_reader(wire::peer::monitor).accept(head_of(frame)); }), "of type 2"));
    for (std::size_t at : {0u, 3u, 6u, 7u, 12u, 15u}) {
        auto broken = frame;
        broken[at] ^= std::byte{0x40};
        BOOST_TEST(!refusal_of([&] { wire::frame_reader(wire::peer::trainer).accept(head_of(broken)); }).empty(), "byte " << at);
    }
    for (int type : {0, 12, 63, 75, 65'535}) {
        frame[4] = static_cast<std::byte>(type);
        frame[5] = static_cast<std::byte>(type >> 8);
        for (auto from : {wire::peer::trainer, wire::peer::monitor})
            BOOST_TEST(says(refusal_of([&] { wire::frame_reader(from).accept(head_of(frame)); }), "of type " + std::to_string(type)));
    }
}

BOOST_AUTO_TEST_CASE(a_message_that_is_replayed_or_left_out_is_refused) {
    wire::frame_writer writer;
    std::vector<std::byte> first, second, third;
    writer.append(first, wire::begin{1, 2});
    writer.append(second, wire::commit{1, {}, {}});
    writer.append(third, wire::begin{2, 3});
    wire::frame_reader reader(wire::peer::trainer);
    reader.accept(head_of(first));
    BOOST_TEST(says(refusal_of([&] { reader.accept(head_of(first)); }), "number 0 where 1 comes next"));
    BOOST_TEST(says(refusal_of([&] { reader.accept(head_of(third)); }), "number 2 where 1 comes next"));
    reader.accept(head_of(second));
    reader.accept(head_of(third));
}

BOOST_AUTO_TEST_CASE(a_message_that_is_too_large_is_refused_by_its_header_alone) {
    for_each_message([&]<class Message>(Message const& m) {
        auto frame = frame_of(m);
        auto set = [&](std::uint64_t n) {
            for (unsigned i = 0; i < 4; ++i) frame[8 + i] = static_cast<std::byte>(n >> 8 * i);
        };
        auto accept = [&] { wire::frame_reader(wire::sender_of(Message::type)).accept(head_of(frame)); };
        set(wire::most_payload_bytes(Message::type));
        BOOST_TEST(refusal_of(accept).empty());
        for (std::uint64_t n : {std::uint64_t{wire::most_payload_bytes(Message::type)} + 1, std::uint64_t{0xffffffff}}) {
            set(n);
            BOOST_TEST(says(refusal_of(accept), std::to_string(n) + " bytes"));
        }
    });
    BOOST_TEST(wire::most_payload_bytes(wire::message::block_data) == (64u << 20) + 16);
    BOOST_TEST(wire::most_payload_bytes(wire::message::hello) == 128u << 20);
    std::vector<std::byte> out;
    wire::frame_writer writer;
    BOOST_CHECK_EXCEPTION(writer.append(out, wire::status_reply{std::string(wire::most_control_bytes, 'x')}), varve::error,
                          [](varve::error const& e) { return e.code() == std::errc::message_size; });
    BOOST_TEST(out.empty());
    writer.append(out, wire::ping{});
    wire::frame_reader(wire::peer::monitor).accept(head_of(out));
}

BOOST_AUTO_TEST_CASE(a_count_is_no_reason_to_allocate) {
    // COMMIT: save, the metadata's count, the digests' count.
    auto const commit = frame_of(wire::commit{1, {}, {}});
    for (std::size_t at : {8u, 12u})
        BOOST_TEST(says(refusal_of([&] { wire::decode<wire::commit>(payload_with(commit, at, 0xffffffff)); }), "promises 4294967295"));
    // HELLO with more layers, tensors, dimensions and other names than any state has, all of them there.
    auto many = [](std::size_t layers, std::size_t tensors, std::size_t dimensions) {
        wire::hello h;
        h.layers.resize(layers);
        if (layers > 0) h.layers[0].tensors.resize(tensors);
        if (tensors > 0) h.layers[0].tensors[0].shape.resize(dimensions);
        return refusal_of([frame = frame_of(h)] { wire::decode<wire::hello>(std::span(frame).subspan(wire::header_bytes)); });
    };
    BOOST_TEST(says(many((1u << 20) + 1, 0, 0), "1048577 layers"));
    BOOST_TEST(says(many(1, (1u << 20) + 1, 0), "more than 1048576 tensors"));
    BOOST_TEST(says(many(1, 1, 65), "65 dimensions"));
    BOOST_TEST(many(1, 1, 64).empty());
    wire::hello h;
    for (std::size_t i = 0; i <= 1u << 20; ++i) h.aliases.emplace_hint(h.aliases.end(), std::to_string(10'000'000 + i), "");
    auto const tied = [&] { return refusal_of([frame = frame_of(h)] { wire::decode<wire::hello>(std::span(frame).subspan(wire::header_bytes)); }); };
    BOOST_TEST(says(tied(), "1048577 keys"));
    h.aliases.erase(h.aliases.begin());
    BOOST_TEST(tied().empty());
}

BOOST_AUTO_TEST_CASE(a_choice_that_nobody_offers_is_refused) {
    auto hello = frame_of(some_hello());
    auto payload = payload_with(hello, 0, wire::version);
    payload[4] = std::byte{3};
    BOOST_TEST(says(refusal_of([&] { wire::decode<wire::hello>(payload); }), "the choice 3"));
    auto fetch = payload_with(frame_of(wire::fetch{}), 9, 0);
    fetch[0] = std::byte{2};
    BOOST_TEST(says(refusal_of([&] { wire::decode<wire::fetch>(fetch); }), "the choice 2"));
    // A key twice: what follows must not depend on which one counts.
    auto pairs = payload_with(frame_of(wire::commit{1, {{"a", "1"}, {"b", "2"}}, {}}), 8, 2);
    pairs[8 + 4 + 4 + 1 + 4 + 1 + 4] = std::byte{'a'};
    BOOST_TEST(says(refusal_of([&] { wire::decode<wire::commit>(pairs); }), "a key twice"));
}

BOOST_AUTO_TEST_CASE(of_a_hello_of_another_version_the_version_alone_is_read) {
    auto payload = payload_with(frame_of(some_hello()), 0, 9);
    payload.resize(payload.size() - 5);
    BOOST_TEST(wire::decode<wire::hello>(payload).version == 9u);
    BOOST_TEST(wire::decode<wire::hello>(payload).store.empty());
}

BOOST_AUTO_TEST_CASE(an_error_keeps_its_code) {
    for (std::error_code code : {make_error_code(varve::errc::store_locked), std::make_error_code(std::errc::no_space_on_device),
                                 std::error_code(5, std::system_category()), std::error_code()}) {
        auto const frame = frame_of(wire::failed{1, code, "why"});
        auto const back = wire::decode<wire::failed>(std::span(frame).subspan(wire::header_bytes));
        BOOST_TEST((back.code == code || back.code.default_error_condition() == code.default_error_condition()));
    }
}

BOOST_AUTO_TEST_CASE(a_block_may_be_sent_from_where_it_is) {
    wire::frame_writer writer;
    std::vector<std::byte> head;
    writer.append_head(head, wire::block_data{7, 65'536, {}}, std::size(some_content));
    head.insert(head.end(), std::begin(some_content), std::end(some_content));
    BOOST_TEST(head == frame_of(wire::block_data{7, 65'536, some_content}));
}

BOOST_AUTO_TEST_SUITE_END()
