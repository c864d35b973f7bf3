#pragma once

#include <boost/asio/io_context.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "varve/asio/transport.hpp"
#include "varve/asio/wire.hpp"
#include "varve/error.hpp"

namespace varve::asio::client {

using deadline = std::chrono::steady_clock::time_point;

/// A whole frame.
struct frame {
    wire::message type = wire::message::ping;
    std::vector<std::byte> payload;
};

/// Takes frames off a stream's bytes, however they are cut.
class frame_buffer {
public:
    explicit frame_buffer(wire::peer from) noexcept : headers_(from) {}

    /// Where the next bytes go.
    std::span<std::byte> room();
    void filled(std::size_t bytes) noexcept { end_ += bytes; }
    /// The next frame if it is there; what it points to is valid until room() is called. Throws errc::malformed.
    std::optional<std::pair<wire::message, std::span<std::byte const>>> next();

private:
    static constexpr std::size_t usual_bytes = 64u << 10;

    wire::frame_reader headers_;
    std::vector<std::byte> bytes_;
    std::size_t begin_ = 0, end_ = 0;
    std::optional<wire::frame_header> header_;
};

/// A connection on which one asks and waits for the answer; every call has its time, and throws error with
/// std::errc::timed_out when that is over, errc::monitor_lost when the connection has ended, and what the monitor refuses with.
class dialogue {
public:
    /// Once `stop` is set every wait ends with errc::cancelled; it outlives this.
    dialogue(address const& to, std::shared_ptr<tls_context const> tls, std::chrono::milliseconds limit, std::atomic<bool> const& stop);

    template <class Message>
    void send(Message const& m, deadline until, std::vector<int> descriptors = {}) {
        std::vector<std::byte> bytes;
        writer_.append(bytes, m);
        send_bytes(bytes, until, std::move(descriptors));
    }
    /// The next message but pings, which it answers. `a_ping_adds`: whoever pings is at work, and has that long from then on, until
    /// `at_most`.
    frame receive(deadline until, std::chrono::milliseconds a_ping_adds = {}, deadline at_most = deadline::max());
    /// The next message, which must be of that type; what it points to is valid until the next is received.
    template <class Message>
    Message expect(deadline until, std::chrono::milliseconds a_ping_adds = {}, deadline at_most = deadline::max()) {
        last_ = receive(until, a_ping_adds, at_most);
        if (last_.type != Message::type) throw error(errc::malformed, "malformed message: an answer to something else");
        return wire::decode<Message>(last_.payload);
    }

    // ---- for who goes on from here on its own ----

    boost::asio::io_context& context() noexcept { return *context_; }
    varve::asio::stream& stream() noexcept { return *stream_; }
    wire::frame_writer& writer() noexcept { return writer_; }
    frame_buffer& buffer() noexcept { return buffer_; }

private:
    void send_bytes(std::span<std::byte const> bytes, deadline until, std::vector<int> descriptors);
    /// Runs the context until `done` is set.
    void wait(bool const& done, deadline until);

    std::atomic<bool> const& stop_;
    std::unique_ptr<boost::asio::io_context> context_;
    std::unique_ptr<varve::asio::stream> stream_;
    wire::frame_writer writer_;
    frame_buffer buffer_{wire::peer::monitor};
    frame last_;
};

/// What a connection that ended with `code` is to those who were waiting: the monitor is lost.
error lost(std::string const& where, std::string const& why);

}  // namespace varve::asio::client
