#pragma once

#include <cstddef>
#include <span>
#include <tuple>
#include <vector>

#include "varve/asio/wire.hpp"

namespace varve_test {

namespace wire = varve::asio::wire;

/// A trainer's first message with something in every field.
inline wire::hello some_hello() {
    wire::hello h;
    h.store = "/data/run";
    h.made_by = "varve 1";
    h.extension = ".safetensors";
    h.layers = {
        {"embedding", {{"model.weight", varve::dtype::BF16, {3, 4}, nullptr, {}}, {"optimizer.weight.step", varve::dtype::I64, {}, nullptr, {}}}},
        {"run", {}}};
    h.aliases = {{"model.head", "model.weight"}};
    h.image_bytes = 65'536 + 32;
    h.header_bytes = 65'536;
    h.block_bytes = 4u << 20;
    h.in_flight = 3;
    h.busy = varve::when_busy::replace;
    h.keep = 4;
    h.keep_every = 100;
    h.prepare = varve::prepare_mode::none;
    h.fresh = true;
    h.region_bytes = {1u << 30, 4u << 20};
    h.relayed = true;
    h.durable_interval_ms = 500;
    h.device = "0123456789abcdef0123456789abcdef";
    return h;
}

inline constexpr std::byte some_content[5] = {std::byte{1}, std::byte{2}, std::byte{3}, std::byte{4}, std::byte{5}};

/// One of each message.
inline auto some_messages() {
    return std::tuple(some_hello(), wire::begin{7, 120}, wire::block_ref{7, 4u << 20, 1000, 1, 8u << 20}, wire::block_data{7, 65'536, some_content},
                      wire::commit{7, {{"loss", "0.5"}, {"lr", ""}}, {1, ~std::uint64_t{0}}}, wire::abandon{7}, wire::fetch{true, 120, 1},
                      wire::status{}, wire::goodbye{}, wire::pong{}, wire::drain{true}, wire::welcome{1, 100, 9, 110, 64u << 20},
                      wire::credit{1u << 20}, wire::release{1, 8u << 20}, wire::crash_safe{7}, wire::durable{7, 10},
                      wire::failed{7, varve::errc::replaced, "replaced"},
                      wire::image{120, 10, 65'568, true, "/data/run/step-000000000120.safetensors"}, wire::image_data{0, some_content},
                      wire::status_reply{"{}"}, wire::refusal{std::make_error_code(std::errc::no_space_on_device), "no"}, wire::ping{});
}

/// The message's frame, with that number.
template <class Message>
std::vector<std::byte> frame_of(Message const& m, std::uint64_t number = 0) {
    std::vector<std::byte> out;
    wire::frame_writer{}.append(out, m);
    for (unsigned i = 0; i < 8; ++i) out[16 + i] = static_cast<std::byte>(number >> 8 * i);
    return out;
}

inline std::span<std::byte const, wire::header_bytes> head_of(std::vector<std::byte> const& frame) {
    return std::span(frame).first<wire::header_bytes>();
}

}  // namespace varve_test
