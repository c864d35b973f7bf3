#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>
#include <thread>

#include "varve/detail/text.hpp"
#include "varve/error.hpp"

#include "addresses.hpp"
#include "socket_io.hpp"

namespace varve::asio {

using transport::outcome;

namespace {

using clock = std::chrono::steady_clock;

[[noreturn]] void refuse_address(std::string_view text, std::string const& why) {
    throw error(std::make_error_code(std::errc::invalid_argument), "'" + varve::detail::printable(text) + "' is no address: " + why);
}

/// Waits until the socket is ready or the time is over; returns 0 or an errno.
int wait_for(int fd, short what, clock::time_point until) noexcept {
    for (;;) {
        auto const left = std::chrono::ceil<std::chrono::milliseconds>(until - clock::now()).count();
        pollfd p{fd, what, 0};
        int const n = ::poll(&p, 1, static_cast<int>(std::clamp<std::int64_t>(left, 0, 60'000)));
        if (n > 0) return 0;
        if (n < 0 && errno != EINTR) return errno;
        if (clock::now() >= until) return ETIMEDOUT;
    }
}

/// Returns 0 or an errno.
int connect_socket(int fd, sockaddr const* to, socklen_t size, clock::time_point until) noexcept {
    for (;;) {
        if (::connect(fd, to, size) == 0) return 0;
        if (errno == EAGAIN) {  // a Unix socket with as many waiting as it takes
            if (clock::now() >= until) return ETIMEDOUT;
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            continue;
        }
        if (errno != EINPROGRESS && errno != EINTR) return errno;
        if (int e = wait_for(fd, POLLOUT, until)) return e;
        int result = 0;
        socklen_t length = sizeof result;
        ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &result, &length);
        return result;
    }
}

}  // namespace

std::string address::text() const {
    if (is_unix()) return "unix:" + path.string();
    return "tcp:" + (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(port);
}

address parse_address(std::string_view text) {
    address out;
    if (text.starts_with("unix:")) {
        out.path = text.substr(5);
        if (out.path.empty() || text.find('\0') != std::string_view::npos) refuse_address(text, "unix: wants a path behind it");
        return out;
    }
    if (!text.starts_with("tcp:")) refuse_address(text, "it must be unix:PATH or tcp:HOST:PORT");
    auto rest = text.substr(4);
    auto const colon = rest.rfind(':');
    if (colon == std::string_view::npos) refuse_address(text, "tcp: wants HOST:PORT behind it");
    auto host = rest.substr(0, colon), port = rest.substr(colon + 1);
    if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
    auto const [end, ec] = std::from_chars(port.data(), port.data() + port.size(), out.port);
    if (ec != std::errc() || end != port.data() + port.size()) refuse_address(text, "its port is no number up to 65535");
    if (host.empty()) refuse_address(text, "its host is missing");
    out.host = host;
    return out;
}

namespace transport {

sockaddr_un unix_address(std::filesystem::path const& path) {
    sockaddr_un out{};
    out.sun_family = AF_UNIX;
    auto const& text = path.native();
    if (text.size() >= sizeof out.sun_path)
        throw error(std::make_error_code(std::errc::filename_too_long), "unix:" + varve::detail::printable(text) +
                                                                            ": the path of a socket has at most " +
                                                                            std::to_string(sizeof out.sun_path - 1) + " bytes; give a shorter one");
    std::memcpy(out.sun_path, text.data(), text.size());
    return out;
}

resolved_addresses resolve(address const& a, bool to_listen) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV | (to_listen ? AI_PASSIVE : 0);
    addrinfo* found = nullptr;
    int const result = ::getaddrinfo(a.host.c_str(), std::to_string(a.port).c_str(), &hints, &found);
    if (result != 0)
        throw error(std::make_error_code(std::errc::address_not_available),
                    varve::detail::printable(a.text()) + ": " + ::gai_strerror(result) + "; check the host's name");
    return resolved_addresses(found, ::freeaddrinfo);
}

static bool is_loopback(sockaddr const* address) noexcept {
    if (address->sa_family == AF_INET) {
        auto const* in = reinterpret_cast<sockaddr_in const*>(address);
        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    }
    if (address->sa_family != AF_INET6) return false;
    auto const* in6 = &reinterpret_cast<sockaddr_in6 const*>(address)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(in6) || (IN6_IS_ADDR_V4MAPPED(in6) && in6->s6_addr[12] == 127);
}

void expect_loopback(address const& a, sockaddr const* found) {
    if (is_loopback(found)) return;
    throw error(
        std::make_error_code(std::errc::operation_not_permitted),
        varve::detail::printable(a.text()) + ": not a loopback address, and TCP without TLS stays on one machine; give --cert, --key and --ca");
}

}  // namespace transport

std::unique_ptr<stream> connect(boost::asio::any_io_executor executor, address const& to, std::shared_ptr<tls_context const> tls,
                                std::chrono::milliseconds limit) {
    auto const until = clock::now() + limit;
    auto fail = [&](std::error_code why) -> std::unique_ptr<stream> {
        throw error(why, "cannot connect to the monitor at " + varve::detail::printable(to.text()) + ": " + why.message());
    };
    file_descriptor fd;
    if (to.is_unix()) {
        auto const where = transport::unix_address(to.path);
        fd = {::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), system_calls::kernel()};
        if (!fd) return fail(last_system_error(errno));
        if (int e = connect_socket(fd.get(), reinterpret_cast<sockaddr const*>(&where), sizeof where, until)) return fail(last_system_error(e));
        auto io = transport::make_plain_io(fd.get(), true);
        return transport::make_stream(std::move(executor), std::move(fd), std::move(io));
    }
    int last = ECONNREFUSED;
    auto const found = transport::resolve(to, false);
    for (auto const* a = found.get(); a; a = a->ai_next) {
        if (!tls) transport::expect_loopback(to, a->ai_addr);
        fd = {::socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), system_calls::kernel()};
        if (!fd) return fail(last_system_error(errno));
        last = connect_socket(fd.get(), a->ai_addr, a->ai_addrlen, until);
        if (last == 0) break;
    }
    if (last != 0) return fail(last_system_error(last));
    transport::set_tcp_options(fd.get());
    auto io = tls ? transport::make_tls_io(tls, fd.get(), to.host) : transport::make_plain_io(fd.get(), false);
    for (auto a = io->greet(); a.what != outcome::moved; a = io->greet()) {
        if (a.what == outcome::end) return fail(std::make_error_code(std::errc::connection_reset));
        if (a.what == outcome::failed) return fail(a.error);
        if (int e = wait_for(fd.get(), a.what == outcome::wants_read ? POLLIN : POLLOUT, until)) return fail(last_system_error(e));
    }
    return transport::make_stream(std::move(executor), std::move(fd), std::move(io));
}

}  // namespace varve::asio
