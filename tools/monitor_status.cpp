#include "monitor_status.hpp"

#include <boost/asio/io_context.hpp>

#include <chrono>
#include <iomanip>
#include <ostream>
#include <vector>

#include <nlohmann/json.hpp>

#include "varve/asio/wire.hpp"
#include "varve/error.hpp"

#include "errors.hpp"

namespace varve::tool {

namespace {

namespace wire = asio::wire;

/// Reads exactly so many bytes.
void read(boost::asio::io_context& context, asio::stream& from, std::span<std::byte> into) {
    bool done = false;
    std::error_code failed;
    from.read(into, into.size(), [&](std::error_code ec, std::size_t) {
        done = true;
        failed = ec;
    });
    context.restart();
    context.run_for(std::chrono::seconds(10));
    if (!done) throw error(std::make_error_code(std::errc::timed_out), "the monitor does not answer");
    throw_if(failed, "the monitor does not answer");
}

std::string gigabytes(nlohmann::json const& bytes) {
    std::ostringstream text;
    text << std::fixed << std::setprecision(3) << bytes.get<double>() / 1e9 << " GB";
    return text.str();
}

}  // namespace

std::shared_ptr<asio::tls_context const> load_monitor_tls(std::string const& certificate, std::string const& key, std::string const& authority,
                                                          bool server) {
    try {
        return asio::load_tls({certificate, key, authority}, server);
    } catch (error const& e) {
        throw usage_error(e.what());
    }
}

std::string monitor_status(asio::address const& at, std::shared_ptr<asio::tls_context const> const& tls) {
    boost::asio::io_context context;
    auto const connection = asio::connect(context.get_executor(), at, tls, std::chrono::seconds(5));
    wire::frame_writer writer;
    std::vector<std::byte> out;
    auto send = [&](auto const& message) {
        out.clear();
        writer.append(out, message);
        std::span<std::byte const> const bytes = out;
        connection->write(std::span(&bytes, 1), [](std::error_code, std::size_t) {});
    };
    wire::hello hello;
    hello.purpose = wire::purpose::status;
    send(hello);
    wire::frame_reader frames(wire::peer::monitor);
    for (;;) {
        std::array<std::byte, wire::header_bytes> head;
        read(context, *connection, head);
        auto const frame = frames.accept(head);
        std::vector<std::byte> payload(frame.payload_bytes);
        if (!payload.empty()) read(context, *connection, payload);
        if (frame.type == wire::message::refusal) {
            auto const why = wire::decode<wire::refusal>(payload);
            throw error(why.code, why.text);
        }
        if (frame.type == wire::message::welcome) send(wire::status{});
        if (frame.type == wire::message::status_reply) return wire::decode<wire::status_reply>(payload).json;
    }
}

int print_monitor_status(asio::address const& at, std::shared_ptr<asio::tls_context const> const& tls, bool as_json, std::ostream& out) {
    auto const status = nlohmann::ordered_json::parse(monitor_status(at, tls));
    if (as_json) {
        out << status.dump(2) << '\n';
        return 0;
    }
    out << at.text() << ": process " << status["pid"] << ", " << gigabytes(status["memory_used_bytes"]) << " of "
        << gigabytes(status["memory_limit_bytes"]) << " in use\n";
    for (auto const& s : status["stores"]) {
        out << s["path"].get<std::string>() << ": " << (s["trainer"] == true ? "a trainer" : "its trainer has gone") << ", " << s["in_flight"]
            << " in flight, " << gigabytes(s["held_bytes"]) << " held";
        if (s.contains("crash_safe_step")) out << ", crash-safe step " << s["crash_safe_step"];
        if (s.contains("durable_step")) out << ", durable step " << s["durable_step"];
        if (s.contains("durable_interval_sec")) out << ", a write in " << s["durable_interval_sec"] << " s";
        if (s.contains("write_gb_per_s")) out << ", " << std::setprecision(3) << s["write_gb_per_s"].get<double>() << " GB/s";
        out << '\n';
    }
    if (status.contains("peer")) {
        if (status["peer"]["stores"].empty()) out << "peer " << status["peer"]["address"].get<std::string>() << ": no store has been open\n";
        for (auto const& s : status["peer"]["stores"]) {
            out << s["path"].get<std::string>() << ": peer " << status["peer"]["address"].get<std::string>()
                << (s["connected"] == true ? ", connected" : ", not connected");
            if (s.contains("why")) out << " (" << s["why"].get<std::string>() << ")";
            if (s.contains("crash_safe_step")) out << ", crash-safe step " << s["crash_safe_step"];
            if (s.contains("durable_step")) out << ", durable step " << s["durable_step"];
            if (s.contains("step")) out << " of " << s["step"];
            out << ", " << gigabytes(s["bytes_sent"]) << " sent";
            if (s.contains("sent_gb_per_s")) out << ", " << std::setprecision(3) << s["sent_gb_per_s"].get<double>() << " GB/s";
            out << '\n';
        }
    }
    if (status.contains("lingering"))
        for (auto const& l : status["lingering"])
            out << l["path"].get<std::string>() << ": step " << l["step"] << " lingers in memory, " << gigabytes(l["bytes"]) << ", "
                << static_cast<int>(l["seconds_left"].get<double>()) << " s more\n";
    return 0;
}

}  // namespace varve::tool
