#include "dialogue.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

namespace varve::asio::client {

/// How soon whoever waits sees that it is over.
static constexpr std::chrono::milliseconds looks_up_every{50};

error lost(std::string const& where, std::string const& why) { return error(errc::monitor_lost, "the monitor at " + where + " is lost: " + why); }

std::span<std::byte> frame_buffer::room() {
    auto const needed = header_ ? wire::header_bytes + header_->payload_bytes : wire::header_bytes;
    if (begin_ > 0) {
        std::memmove(bytes_.data(), bytes_.data() + begin_, end_ - begin_);
        end_ -= begin_;
        begin_ = 0;
    }
    // A large frame grows as it comes: a header alone is no reason to allocate.
    auto const wanted = std::max(usual_bytes, std::min(needed, 2 * end_));
    if (bytes_.size() < wanted || bytes_.size() > 2 * std::max(usual_bytes, needed)) bytes_.resize(wanted);
    return std::span(bytes_).subspan(end_);
}

std::optional<std::pair<wire::message, std::span<std::byte const>>> frame_buffer::next() {
    if (!header_) {
        if (end_ - begin_ < wire::header_bytes) return std::nullopt;
        header_ = headers_.accept(std::span<std::byte const>(bytes_).subspan(begin_).first<wire::header_bytes>());
    }
    auto const whole = wire::header_bytes + header_->payload_bytes;
    if (end_ - begin_ < whole) return std::nullopt;
    auto const payload = std::span<std::byte const>(bytes_).subspan(begin_ + wire::header_bytes, header_->payload_bytes);
    auto const type = header_->type;
    header_.reset();
    begin_ += whole;
    return std::pair(type, payload);
}

dialogue::dialogue(address const& to, std::shared_ptr<tls_context const> tls, std::chrono::milliseconds limit, std::atomic<bool> const& stop)
    : stop_(stop), context_(std::make_unique<boost::asio::io_context>(1)), stream_(connect(context_->get_executor(), to, std::move(tls), limit)) {}

void dialogue::wait(bool const& done, deadline until) {
    bool const in_time = std::chrono::steady_clock::now() < until;
    context_->restart();
    for (auto now = std::chrono::steady_clock::now(); !done && now < until && !stop_; now = std::chrono::steady_clock::now())
        if (context_->run_one_until(std::min(until, now + looks_up_every)) == 0) context_->restart();
    if (!done && !stop_ && in_time) {
        // After a stop of this process the clock is ahead of what came meanwhile.
        context_->restart();
        context_->poll();
    }
    if (done) return;
    // The handler has not run and refers to the caller's frame.
    stream_->close();
    context_->restart();
    while (!done) context_->run_one();
    if (stop_) throw error(errc::cancelled);
    throw error(std::make_error_code(std::errc::timed_out), "the monitor at " + stream_->peer() + " does not answer in time");
}

void dialogue::send_bytes(std::span<std::byte const> bytes, deadline until, std::vector<int> descriptors) {
    bool done = false;
    std::error_code failed;
    stream_->write(
        std::array{bytes},
        [&](std::error_code ec, std::size_t) {
            failed = ec;
            done = true;
        },
        std::move(descriptors));
    wait(done, until);
    if (!failed) return;
    // A monitor that refuses says so before it ends the connection, and that is what to tell.
    try {
        for (auto const by = std::min(until, std::chrono::steady_clock::now() + std::chrono::milliseconds(200));;) receive(by);
    } catch (error const& e) {
        if (e.code() != std::errc::timed_out) throw;
    }
    throw lost(stream_->peer(), failed.message());
}

frame dialogue::receive(deadline until, std::chrono::milliseconds a_ping_adds, deadline at_most) {
    for (;;) {
        while (auto const next = buffer_.next()) {
            auto const& [type, payload] = *next;
            if (type == wire::message::refusal) {
                auto const why = wire::decode<wire::refusal>(payload);
                throw error(why.code ? why.code : make_error_code(errc::monitor_lost), why.text);
            }
            if (type != wire::message::ping) return {type, {payload.begin(), payload.end()}};
            until = std::max(until, std::min<deadline>(std::chrono::steady_clock::now() + a_ping_adds, at_most));
            send(wire::pong{}, until);
        }
        bool done = false;
        std::error_code failed;
        std::size_t came = 0;
        stream_->read(buffer_.room(), 1, [&](std::error_code ec, std::size_t n) {
            failed = ec;
            came = n;
            done = true;
        });
        wait(done, until);
        buffer_.filled(came);
        if (failed && came == 0) throw lost(stream_->peer(), failed.message());
    }
}

}  // namespace varve::asio::client
