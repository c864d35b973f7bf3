// How fast a monitor takes a checkpoint in over TCP, until it is crash-safe, beside what the machine's loopback gives: iperf3
// without TLS, and a plain transfer through the same TLS library with it. They take turns; medians are printed.
//
//     monitor_transfer [--size-mb 512] [--repeat 5] [--dir FOLDER]     FOLDER: best in memory, so that no disk is measured
//     monitor_transfer --tls ...                                       certificates are made by the command openssl
//     monitor_transfer --two-hosts ...                                 the same between two network namespaces with a cable; needs root

#include <boost/asio/io_context.hpp>
#include <boost/asio/ssl/context.hpp>

#include <arpa/inet.h>
#include <fcntl.h>
#include <openssl/ssl.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "varve/asio/monitor/monitor.hpp"
#include "varve/asio/transport.hpp"
#include "varve/asio/wire.hpp"
#include "varve/detail/digest.hpp"
#include "varve/format/safetensors.hpp"

#include "timing.hpp"

namespace {

namespace va = varve::asio;
namespace wire = varve::asio::wire;
using namespace std::chrono_literals;
using varve_bench::clock_type, varve_bench::median;

double gb_per_s(std::uint64_t bytes, clock_type::time_point since) {
    return static_cast<double>(bytes) / std::chrono::duration<double>(clock_type::now() - since).count() / 1e9;
}

[[noreturn]] void fail(std::string const& what) {
    std::fprintf(stderr, "monitor_transfer: %s\n", what.c_str());
    std::exit(1);
}

void run(std::string const& command) {
    if (std::system((command + " > /dev/null 2>&1").c_str()) != 0) fail("this failed: " + command);
}

/// Where each side stands: on the loopback, or on two hosts as far as the network goes, which are gone with the object. A socket
/// belongs to the host that it was made on, whichever thread uses it.
class hosts {
public:
    explicit hosts(bool two) {
        if (!two) return;
        name_ = "varve-" + std::to_string(::getpid());
        address = "10.88.0.1";
        auto const server = name_ + "-s", client = name_ + "-c";
        run("ip netns add " + server);
        run("ip netns add " + client);
        run("ip -n " + server + " link add cable type veth peer name cable netns " + client);
        for (auto const& [host, at] : {std::pair(server, "10.88.0.1/24"), std::pair(client, "10.88.0.2/24")}) {
            run("ip -n " + host + " address add " + at + " dev cable");
            run("ip -n " + host + " link set cable up");
        }
    }
    ~hosts() {
        for (char const* host : {"-s", "-c"})
            if (!name_.empty()) static_cast<void>(std::system(("ip netns del " + name_ + host).c_str()));
    }
    hosts(hosts const&) = delete;

    std::string address = "127.0.0.1";

    template <class Call>
    auto on_server(Call call) const {
        return on("-s", call);
    }
    template <class Call>
    auto on_client(Call call) const {
        return on("-c", call);
    }

private:
    template <class Call>
    auto on(char const* host, Call call) const {
        if (name_.empty()) return call();
        int const here = ::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
        int const there = ::open(("/run/netns/" + name_ + host).c_str(), O_RDONLY | O_CLOEXEC);
        if (::setns(there, CLONE_NEWNET) != 0) fail("no way into the namespace");
        auto result = call();
        ::setns(here, CLONE_NEWNET);
        ::close(here);
        ::close(there);
        return result;
    }

    std::string name_;
};

/// One certificate for both sides, of an authority of its own.
va::tls_files certificates(std::filesystem::path const& folder, std::string const& address) {
    auto at = [&](char const* name) { return (folder / name).string(); };
    run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca -keyout " + at("ca.key") + " -out " +
        at("ca.pem"));
    run("openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=peer -keyout " + at("peer.key") + " -out " + at("peer.csr"));
    std::ofstream(at("peer.ext")) << "subjectAltName=IP:" << address << "\n";
    run("openssl x509 -req -in " + at("peer.csr") + " -CA " + at("ca.pem") + " -CAkey " + at("ca.key") + " -CAcreateserial -days 2 -extfile " +
        at("peer.ext") + " -out " + at("peer.pem"));
    return {at("peer.pem"), at("peer.key"), at("ca.pem")};
}

/// A trainer that has one tensor and hashed it beforehand.
class sender {
public:
    sender(va::address const& to, std::shared_ptr<va::tls_context const> tls, std::uint64_t bytes)
        : data_(bytes), stream_(va::connect(context_.get_executor(), to, std::move(tls), 5s)) {
        for (std::size_t i = 0; i < data_.size(); i += 64) data_[i] = static_cast<std::byte>(i >> 6);
        varve::state s;
        s.layers = {{"a", {{"a.w", varve::dtype::U8, {static_cast<std::int64_t>(bytes)}, data_.data(), {}}}}};
        layout_ = varve::safetensors().lay_out(s);
        digests_.resize(varve::detail::chunk_count(bytes));
        varve::detail::chunk_digests(data_, digests_);
        wire::hello h;
        h.store = "run";
        h.extension = ".safetensors";
        h.layers = s.layers;
        h.image_bytes = layout_.size_bytes;
        h.header_bytes = layout_.header_bytes;
        h.block_bytes = block_bytes;
        h.busy = varve::when_busy::replace;
        send(h);
        credit_ = expect<wire::welcome>().credit_bytes;
    }

    /// Sends one save; returns GB/s from its first byte until it is crash-safe.
    double save() {
        ++save_;
        auto const since = clock_type::now();
        send(wire::begin{save_, save_});
        for (std::size_t at = 0; at < data_.size(); at += block_bytes) {
            auto const bytes = std::span<std::byte const>(data_).subspan(at, std::min(block_bytes, data_.size() - at));
            while (credit_ < bytes.size()) expect<wire::credit>();
            credit_ -= bytes.size();
            head_.clear();
            writer_.append_head(head_, wire::block_data{save_, layout_.header_bytes + at, {}}, bytes.size());
            std::array<std::span<std::byte const>, 2> const pieces{head_, bytes};
            write(pieces);
        }
        send(wire::commit{save_, {}, digests_});
        expect<wire::crash_safe>();
        return gb_per_s(data_.size(), since);
    }

private:
    static constexpr std::size_t block_bytes = 8u << 20;

    template <class Message>
    void send(Message const& m) {
        head_.clear();
        writer_.append(head_, m);
        std::array<std::span<std::byte const>, 1> const pieces{head_};
        write(pieces);
    }
    void write(std::span<std::span<std::byte const> const> pieces) {
        bool done = false;
        stream_->write(pieces, [&](std::error_code ec, std::size_t) {
            if (ec) fail("the connection ended: " + ec.message());
            done = true;
        });
        wait(done);
    }
    void wait(bool const& done) {
        while (!done) {
            context_.restart();
            context_.run_one();
        }
    }
    void read(std::span<std::byte> into) {
        bool done = false;
        stream_->read(into, into.size(), [&](std::error_code ec, std::size_t) {
            if (ec) fail("the connection ended: " + ec.message());
            done = true;
        });
        wait(done);
    }
    template <class Message>
    Message expect() {
        for (;;) {
            std::array<std::byte, wire::header_bytes> head;
            read(head);
            auto const frame = reader_.accept(head);
            payload_.resize(frame.payload_bytes);
            if (!payload_.empty()) read(payload_);
            if (frame.type == wire::message::ping) send(wire::pong{});
            if (frame.type == wire::message::refusal) fail(wire::decode<wire::refusal>(payload_).text);
            if (frame.type == wire::message::credit) credit_ += wire::decode<wire::credit>(payload_).bytes;
            if (frame.type == Message::type) return wire::decode<Message>(payload_);
        }
    }

    boost::asio::io_context context_;
    std::vector<std::byte> data_, head_, payload_;
    std::unique_ptr<va::stream> stream_;
    varve::image layout_;
    std::vector<std::uint64_t> digests_;
    wire::frame_writer writer_;
    wire::frame_reader reader_{wire::peer::monitor};
    std::uint64_t credit_ = 0, save_ = 0;
};

double iperf3(int port) {
    auto const text = std::to_string(port);
    std::jthread server([&] { run("iperf3 -s -1 -p " + text); });
    std::this_thread::sleep_for(300ms);
    std::string out;
    auto* pipe = ::popen(("iperf3 -c 127.0.0.1 -p " + text + " -t 2 -J").c_str(), "r");
    char buffer[4096];
    while (auto const n = std::fread(buffer, 1, sizeof buffer, pipe)) out.append(buffer, n);
    ::pclose(pipe);
    auto const json = nlohmann::json::parse(out, nullptr, false);
    if (json.is_discarded() || !json.contains("end")) fail("iperf3 is not installed, or failed");
    return json["end"]["sum_received"]["bits_per_second"].get<double>() / 8e9;
}

/// One thread writes, one reads, through OpenSSL on blocking sockets, in pieces as large as it takes, and many records a call: one
/// write for each record of 16 KiB is half as fast between two hosts.
double plain_tls(hosts const& where, va::tls_files const& files, std::uint64_t bytes) {
    auto context = [&](bool server) {
        auto c =
            std::make_unique<boost::asio::ssl::context>(server ? boost::asio::ssl::context::tlsv13_server : boost::asio::ssl::context::tlsv13_client);
        c->use_certificate_chain_file(files.certificate.string());
        c->use_private_key_file(files.key.string(), boost::asio::ssl::context::pem);
        ::SSL_CTX_set_read_ahead(c->native_handle(), 1);
        ::SSL_CTX_set_default_read_buffer_len(c->native_handle(), 1u << 20);
        return c;
    };
    auto const new_socket = [] { return ::socket(AF_INET, SOCK_STREAM, 0); };
    int const listening = where.on_server(new_socket);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    ::inet_pton(AF_INET, where.address.c_str(), &at.sin_addr);
    socklen_t size = sizeof at;
    if (::bind(listening, reinterpret_cast<sockaddr*>(&at), size) != 0 || ::listen(listening, 1) != 0) fail("no socket");
    ::getsockname(listening, reinterpret_cast<sockaddr*>(&at), &size);
    auto const theirs = context(true), ours = context(false);
    std::jthread reader([&] {
        int const fd = ::accept(listening, nullptr, nullptr);
        auto* ssl = ::SSL_new(theirs->native_handle());
        ::SSL_set_fd(ssl, fd);
        if (::SSL_accept(ssl) != 1) fail("no handshake");
        std::vector<char> buffer(1u << 20);
        for (std::uint64_t got = 0; got < bytes;) {
            int const n = ::SSL_read(ssl, buffer.data(), static_cast<int>(buffer.size()));
            if (n <= 0) fail("the plain transfer broke off");
            got += static_cast<std::uint64_t>(n);
        }
        ::SSL_write(ssl, "k", 1);
        ::SSL_free(ssl);
        ::close(fd);
    });
    int const fd = where.on_client(new_socket);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&at), size) != 0) fail("no connection");
    auto* ssl = ::SSL_new(ours->native_handle());
    auto* const buffered = ::BIO_new(::BIO_f_buffer());
    BIO_set_write_buffer_size(buffered, 1l << 20);
    ::SSL_set_bio(ssl, ::BIO_new_socket(fd, BIO_NOCLOSE), ::BIO_push(buffered, ::BIO_new_socket(fd, BIO_NOCLOSE)));
    if (::SSL_connect(ssl) != 1) fail("no handshake");
    std::vector<char> piece(8u << 20, 'x');
    auto const since = clock_type::now();
    for (std::uint64_t put = 0; put < bytes;) {
        int const n = ::SSL_write(ssl, piece.data(), static_cast<int>(std::min<std::uint64_t>(piece.size(), bytes - put)));
        if (n <= 0) fail("the plain transfer broke off");
        put += static_cast<std::uint64_t>(n);
    }
    static_cast<void>(BIO_flush(buffered));
    char last;
    ::SSL_read(ssl, &last, 1);
    auto const rate = gb_per_s(bytes, since);
    ::SSL_free(ssl);
    ::close(fd);
    ::close(listening);
    return rate;
}

}  // namespace

int main(int argc, char** argv) {
    std::uint64_t size_mb = 512, repeat = 5;
    bool tls = false, two_hosts = false;
    std::filesystem::path dir = std::filesystem::temp_directory_path();
    for (int i = 1; i < argc; ++i) {
        std::string const a = argv[i];
        if (a == "--tls") tls = true;
        if (a == "--two-hosts") tls = two_hosts = true;
        if (a == "--size-mb" && i + 1 < argc) size_mb = std::strtoull(argv[++i], nullptr, 10);
        if (a == "--repeat" && i + 1 < argc) repeat = std::max(1ull, std::strtoull(argv[++i], nullptr, 10));
        if (a == "--dir" && i + 1 < argc) dir = argv[++i];
    }
    dir /= "varve-transfer-" + std::to_string(::getpid());
    std::filesystem::create_directories(dir);
    auto const bytes = size_mb << 20;
    static hosts const where(two_hosts);  // gone at exit too
    va::monitor_options o;
    o.dir = dir;
    o.listen = {va::parse_address("tcp:" + where.address + ":0")};
    o.memory_limit_bytes = 6 * bytes + (std::uint64_t{1} << 30);
    o.linger = 0ms;
    std::shared_ptr<va::tls_context const> client;
    va::tls_files files;
    if (tls) {
        files = certificates(dir, where.address);
        o.tls = va::load_tls(files, true);
        client = va::load_tls(files, false);
    }
    std::vector<double> ours, theirs;
    {
        auto const made = where.on_server([&] { return std::make_unique<va::monitor>(o); });
        auto& monitor = *made;
        std::jthread serving([&] { monitor.run(); });
        {
            auto const sends = where.on_client([&] { return std::make_unique<sender>(monitor.where().front(), client, bytes); });
            auto& trainer = *sends;
            // Twice unmeasured: what is allocated for a first image is used again afterwards.
            for (int i = 0; i < 3; ++i) trainer.save();
            for (std::uint64_t i = 0; i < repeat; ++i) {
                theirs.push_back(tls ? plain_tls(where, files, bytes) : iperf3(15'201 + static_cast<int>(i)));
                std::this_thread::sleep_for(1s);  // the file of the last save is written by then
                ours.push_back(trainer.save());
            }
        }
        monitor.stop();
    }
    std::filesystem::remove_all(dir);
    std::printf("%s: monitor %.3f GB/s, %s %.3f GB/s, ratio %.3f (medians of %zu, %llu MiB)\n", two_hosts ? "two hosts" : "loopback", median(ours),
                tls ? "plain TLS" : "iperf3", median(theirs), median(ours) / median(theirs), ours.size(), static_cast<unsigned long long>(size_mb));
}
