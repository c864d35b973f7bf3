#include <boost/test/unit_test.hpp>

#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>

#include <sys/mman.h>
#include <sys/stat.h>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <numeric>
#include <thread>

#include "scratch_folder.hpp"
#include "support.hpp"
#include "test_certificates.hpp"
#include "varve/asio/transport.hpp"
#include "varve/error.hpp"

namespace varve_test {

namespace va = varve::asio;
using namespace std::chrono_literals;

namespace {

/// What a server with TLS is told when it reads from the client, which runs on a thread of its own.
std::string server_sees(test_certificates const& files, std::function<void(va::address const&)> client) {
    boost::asio::io_context context;
    va::listener listening(context.get_executor(), va::parse_address("tcp:127.0.0.1:0"), files.load("server", true));
    std::error_code seen;
    std::unique_ptr<va::stream> there;
    std::byte unused[1];
    listening.accept(context.get_executor(), [&](std::error_code, std::unique_ptr<va::stream> s) {
        there = std::move(s);
        there->read(unused, 1, [&](std::error_code ec, std::size_t) {
            seen = ec;
            there->close();
        });
    });
    std::jthread running([&] { client(listening.where()); });
    for (int i = 0; i < 600 && !seen; ++i) {
        context.restart();
        context.run_one_for(50ms);
    }
    return seen.message();
}

/// Both ends of a connection, on one thread that the test itself runs.
class pair_of_ends {
public:
    explicit pair_of_ends(va::address const& at, std::shared_ptr<va::tls_context const> server = nullptr,
                          std::shared_ptr<va::tls_context const> client = nullptr)
        : listening(context.get_executor(), at, server) {
        listening.accept(context.get_executor(), [this](std::error_code ec, std::unique_ptr<va::stream> s) {
            accept_error = ec;
            there = std::move(s);
        });
        // With TLS either side waits for the other.
        std::thread connecting([&] {
            try {
                here = va::connect(context.get_executor(), listening.where(), client, 5s);
            } catch (varve::error const& e) {
                why = e.what();
            }
            connected = true;
        });
        while (!there && !accept_error) step();
        std::byte unused[1];
        if (server && there) {
            bool answered = false;
            there->read(unused, 1, [&](std::error_code, std::size_t) { answered = true; });
            while (!connected && !answered) step();
            if (here) send(*here, std::string(1, '.'));
            while (!answered) step();
        }
        connecting.join();
    }
    ~pair_of_ends() {
        here.reset();
        there.reset();
        listening.close();
        context.restart();
        context.poll();
    }

    void step() {
        context.restart();
        context.run_one_for(100ms);
    }
    void send(va::stream& from, std::string const& text, std::vector<int> descriptors = {}) {
        bool done = false;
        auto const bytes = std::as_bytes(std::span(text));
        from.write(
            std::span(&bytes, 1),
            [&](std::error_code ec, std::size_t n) {
                done = true;
                BOOST_TEST(!ec, ec.message());
                BOOST_TEST(n == text.size());
            },
            descriptors);
        while (!done) step();
    }
    std::string receive(va::stream& at, std::size_t size, std::error_code expected = {}) {
        std::string text(size, '\0');
        bool done = false;
        at.read(std::as_writable_bytes(std::span(text)), size, [&](std::error_code ec, std::size_t n) {
            done = true;
            BOOST_TEST(ec == expected, ec.message());
            text.resize(n);
        });
        while (!done) step();
        return text;
    }

    boost::asio::io_context context;
    va::listener listening;
    std::unique_ptr<va::stream> here, there;
    std::error_code accept_error;
    std::string why;
    std::atomic<bool> connected = false;
};

va::address unix_in(scratch_folder const& folder) { return va::parse_address("unix:" + (folder.path().filename() / "s").string()); }
va::address loopback() { return va::parse_address("tcp:127.0.0.1:0"); }

template <class Call>
void refuses(std::errc expected, std::string const& words, Call call) {
    BOOST_CHECK_EXCEPTION(call(), varve::error, [&](varve::error const& e) {
        BOOST_TEST((e.code() == expected), e.code().message());
        BOOST_TEST(std::string(e.what()).find(words) != std::string::npos, e.what());
        return true;
    });
}

/// More than any socket's buffers hold.
std::string large_text() {
    std::string text(24u << 20, '\0');
    std::uint64_t x = 1;
    for (auto& c : text) c = static_cast<char>((x = x * 6364136223846793005u + 1442695040888963407u) >> 56);
    return text;
}

void carries_both_ways(pair_of_ends& ends) {
    BOOST_TEST_REQUIRE(ends.here.get(), ends.why);
    BOOST_TEST_REQUIRE(ends.there.get());
    ends.send(*ends.here, "from here");
    BOOST_TEST(ends.receive(*ends.there, 9) == "from here");
    ends.send(*ends.there, "and back");
    BOOST_TEST(ends.receive(*ends.here, 8) == "and back");

    // At once in both directions, in pieces, larger than what is between the ends.
    auto const text = large_text();
    auto const bytes = std::as_bytes(std::span(text));
    std::array<std::span<std::byte const>, 3> const pieces{bytes.first(1), bytes.subspan(1, 1'000'000), bytes.subspan(1'000'001)};
    std::string at_here(text.size(), '\0'), at_there(text.size(), '\0');
    int left = 4;
    auto done = [&](std::error_code ec, std::size_t n) {
        --left;
        BOOST_TEST(!ec, ec.message());
        BOOST_TEST(n == text.size());
    };
    ends.here->write(pieces, done);
    ends.there->write(pieces, done);
    ends.here->read(std::as_writable_bytes(std::span(at_here)), text.size(), done);
    ends.there->read(std::as_writable_bytes(std::span(at_there)), text.size(), done);
    while (left > 0) ends.step();
    BOOST_TEST((at_here == text));
    BOOST_TEST((at_there == text));

    ends.send(*ends.there, "last words");
    ends.there->close();
    BOOST_TEST(ends.receive(*ends.here, 100, boost::system::error_code(boost::asio::error::eof)) == "last words");
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_unix_socket_carries_bytes_both_ways) {
    scratch_folder folder;
    pair_of_ends ends(unix_in(folder));
    BOOST_TEST(ends.there->peer_uid().value() == ::getuid());
    BOOST_TEST(ends.there->peer().find("process") != std::string::npos);
    carries_both_ways(ends);
}

BOOST_AUTO_TEST_CASE(tcp_carries_bytes_both_ways) {
    pair_of_ends ends(loopback());
    BOOST_TEST(ends.listening.where().port != 0);
    BOOST_TEST(!ends.there->passes_descriptors());
    BOOST_TEST(!ends.there->peer_uid().has_value());
    carries_both_ways(ends);
}

BOOST_AUTO_TEST_CASE(tls_carries_bytes_both_ways) {
    test_certificates files;
    if (!files.usable()) return;
    pair_of_ends ends(loopback(), files.load("server", true), files.load("client", false));
    carries_both_ways(ends);
}

BOOST_AUTO_TEST_CASE(a_certificate_of_another_authority_is_refused_on_either_side) {
    test_certificates files;
    if (!files.usable()) return;
    {
        pair_of_ends ends(loopback(), files.load("stranger", true), files.load("client", false));
        BOOST_TEST(!ends.here.get());
        BOOST_TEST(ends.why.find("certificate verify failed") != std::string::npos, ends.why);
    }
    // The client is through with its part of the handshake before the server has seen its certificate.
    std::error_code at_client;
    auto const at_server = server_sees(files, [&](va::address const& server) {
        boost::asio::io_context others;
        std::byte unused[1];
        auto const here = va::connect(others.get_executor(), server, files.load("stranger", false, "ca"), 5s);
        here->read(unused, 1, [&](std::error_code ec, std::size_t) { at_client = ec; });
        others.run_for(5s);
    });
    BOOST_TEST(at_server.find("certificate verify failed") != std::string::npos, at_server);
    BOOST_TEST(static_cast<bool>(at_client));
}

BOOST_AUTO_TEST_CASE(older_versions_of_tls_and_clients_without_a_certificate_are_refused) {
    test_certificates files;
    if (!files.usable()) return;
    auto with_openssl = [&](std::string const& options) {
        return server_sees(files, [&](va::address const& server) {
            auto const command =
                "openssl s_client -connect 127.0.0.1:" + std::to_string(server.port) + " -CAfile " + files.path("ca.pem") + " " + options;
            static_cast<void>(std::system((command + " < /dev/null > /dev/null 2>&1").c_str()));
        });
    };
    auto const certificate = "-cert " + files.path("client.pem") + " -key " + files.path("client.key");
    auto const good = with_openssl("-tls1_3 " + certificate);
    BOOST_TEST(good == boost::system::error_code(boost::asio::error::eof).message());
    auto const older = with_openssl("-tls1_2 " + certificate);
    BOOST_TEST(older.find("unsupported protocol") != std::string::npos, older);
    auto const nobody = with_openssl("-tls1_3");
    BOOST_TEST(nobody.find("peer did not return a certificate") != std::string::npos, nobody);
}

BOOST_AUTO_TEST_CASE(a_certificate_that_names_another_host_is_refused) {
    test_certificates files;
    if (!files.usable()) return;
    pair_of_ends ends(loopback(), files.load("elsewhere", true), files.load("client", false));
    BOOST_TEST(!ends.here.get());
    BOOST_TEST(ends.why.find("certificate verify failed") != std::string::npos, ends.why);
}

BOOST_AUTO_TEST_CASE(tls_does_not_talk_to_a_peer_without_it) {
    test_certificates files;
    if (!files.usable()) return;
    pair_of_ends ends(loopback());
    bool done = false;
    boost::asio::io_context others;
    refuses(std::errc::timed_out, "tcp:127.0.0.1",
            [&] { va::connect(others.get_executor(), ends.listening.where(), files.load("client", false), 200ms); });
    done = true;
    BOOST_TEST(done);
}

BOOST_AUTO_TEST_CASE(unusable_certificates_are_named) {
    test_certificates files;
    if (!files.usable()) return;
    refuses(std::errc::invalid_argument, "absent",
            [&] { va::load_tls({files.path("absent"), files.path("server.key"), files.path("ca.pem")}, true); });
    refuses(std::errc::invalid_argument, "client.key",
            [&] { va::load_tls({files.path("server.pem"), files.path("client.key"), files.path("ca.pem")}, true); });
}

BOOST_AUTO_TEST_CASE(descriptors_go_along_a_unix_socket) {
    scratch_folder folder;
    pair_of_ends ends(unix_in(folder));
    // More than one message of the kernel's takes.
    std::vector<varve::file_descriptor> files;
    std::vector<int> numbers;
    for (int i = 0; i < 300; ++i) {
        files.emplace_back(::memfd_create("t", MFD_CLOEXEC), varve::system_calls::kernel());
        BOOST_TEST_REQUIRE(::pwrite(files.back().get(), &i, sizeof i, 0) == static_cast<ssize_t>(sizeof i));
        numbers.push_back(files.back().get());
    }
    ends.send(*ends.here, "with descriptors", numbers);
    BOOST_TEST(ends.receive(*ends.there, 16) == "with descriptors");
    auto const got = ends.there->take_descriptors();
    BOOST_TEST_REQUIRE(got.size() == 300u);
    for (int i = 0; i < 300; ++i) {
        int content = -1;
        ::pread(got[static_cast<std::size_t>(i)].get(), &content, sizeof content, 0);
        BOOST_TEST(content == i);
        BOOST_TEST((::fcntl(got[static_cast<std::size_t>(i)].get(), F_GETFD) & FD_CLOEXEC) != 0);
    }
    BOOST_TEST(ends.there->take_descriptors().empty());
}

BOOST_AUTO_TEST_CASE(closing_ends_what_is_pending) {
    scratch_folder folder;
    pair_of_ends ends(unix_in(folder));
    std::byte b[1];
    std::error_code outcome;
    bool done = false;
    ends.here->read(b, 1, [&](std::error_code ec, std::size_t) {
        done = true;
        outcome = ec;
    });
    ends.here.reset();
    BOOST_TEST(!done);
    while (!done) ends.step();
    BOOST_TEST(outcome == std::error_code(boost::system::error_code(boost::asio::error::operation_aborted)));
}

BOOST_AUTO_TEST_CASE(a_socket_s_file_is_private_and_goes_with_the_listener) {
    scratch_folder folder;
    boost::asio::io_context context;
    auto const at = unix_in(folder);
    {
        va::listener one(context.get_executor(), at, nullptr);
        struct stat info{};
        BOOST_TEST_REQUIRE(::stat(at.path.c_str(), &info) == 0);
        BOOST_TEST((info.st_mode & 0777) == 0600u);
        refuses(std::errc::address_in_use, "another monitor", [&] { va::listener two(context.get_executor(), at, nullptr); });
        BOOST_TEST(std::filesystem::exists(at.path));
    }
    BOOST_TEST(!std::filesystem::exists(at.path));
}

BOOST_AUTO_TEST_CASE(a_dead_listener_s_socket_is_replaced_and_other_files_are_not) {
    scratch_folder folder;
    boost::asio::io_context context;
    auto const at = unix_in(folder);
    {
        va::listener dead(context.get_executor(), at, nullptr);
        std::filesystem::create_hard_link(at.path, folder.path() / "kept");
    }
    std::filesystem::rename(folder.path() / "kept", at.path);
    {
        va::listener next(context.get_executor(), at, nullptr);
    }
    BOOST_TEST(!std::filesystem::exists(at.path));
    std::ofstream(at.path) << "thesis";
    refuses(std::errc::file_exists, "no socket", [&] { va::listener next(context.get_executor(), at, nullptr); });
    BOOST_TEST(std::filesystem::file_size(at.path) == 6u);
}

BOOST_AUTO_TEST_CASE(tcp_without_tls_stays_on_the_machine) {
    boost::asio::io_context context;
    refuses(std::errc::operation_not_permitted, "--cert",
            [&] { va::listener l(context.get_executor(), va::parse_address("tcp:0.0.0.0:0"), nullptr); });
    refuses(std::errc::operation_not_permitted, "--cert",
            [&] { va::connect(context.get_executor(), va::parse_address("tcp:192.0.2.1:1"), nullptr, 1s); });
}

BOOST_AUTO_TEST_CASE(what_cannot_be_connected_to_is_one_line) {
    scratch_folder folder;
    boost::asio::io_context context;
    refuses(std::errc::no_such_file_or_directory, "unix:", [&] { va::connect(context.get_executor(), unix_in(folder), nullptr, 1s); });
    refuses(std::errc::connection_refused,
            "tcp:127.0.0.1:1:", [&] { va::connect(context.get_executor(), va::parse_address("tcp:127.0.0.1:1"), nullptr, 1s); });
    refuses(std::errc::filename_too_long, "at most",
            [&] { va::connect(context.get_executor(), va::parse_address("unix:/" + std::string(200, 'x')), nullptr, 1s); });
}

BOOST_AUTO_TEST_CASE(addresses_read_as_they_are_written) {
    for (char const* text : {"unix:/run/varve", "tcp:host:5000", "tcp:[::1]:1", "tcp:10.0.0.1:65535"})
        BOOST_TEST(va::parse_address(text).text() == text);
    for (char const* text : {"", "host:1", "unix:", "tcp:host", "tcp::1", "tcp:host:", "tcp:host:65536", "tcp:host:-1", "tcp:host:1x"})
        BOOST_CHECK_THROW(va::parse_address(text), varve::error);
}

}  // namespace varve_test
