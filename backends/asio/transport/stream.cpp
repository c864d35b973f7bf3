#include <boost/asio/error.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/post.hpp>

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "varve/error.hpp"

#include "socket_io.hpp"

namespace varve::asio {

namespace transport {

namespace {

/// Reads and writes as they go, and waits for the socket in between. It lives until the last handler has run.
class connection : public std::enable_shared_from_this<connection> {
public:
    connection(boost::asio::any_io_executor executor, int domain, file_descriptor descriptor, std::unique_ptr<socket_io> io)
        : socket_(executor), io_(std::move(io)), is_tcp_(domain != AF_UNIX) {
        socket_.assign(boost::asio::generic::stream_protocol(domain, IPPROTO_IP), descriptor.get());
        descriptor.release();
    }

    boost::asio::any_io_executor executor() { return socket_.get_executor(); }
    int native() { return socket_.native_handle(); }
    bool closed() const noexcept { return closed_; }

    void start_read(std::span<std::byte> into, std::size_t least, stream::handler done) {
        read_ = {into, std::min(least, into.size()), 0, std::move(done)};
        go_on_reading(true);
    }

    void start_write(std::span<std::span<std::byte const> const> pieces, stream::handler done, std::vector<int> descriptors) {
        write_ = {};
        for (auto piece : pieces)
            if (!piece.empty()) write_.pieces.push_back({const_cast<std::byte*>(piece.data()), piece.size()});
        write_.descriptors = std::move(descriptors);
        write_.done = std::move(done);
        go_on_writing(true);
    }

    void end_writing() noexcept {
        boost::system::error_code ignored;
        socket_.shutdown(boost::asio::socket_base::shutdown_send, ignored);
    }

    void close() noexcept {
        if (std::exchange(closed_, true)) return;
        io_->end();
        boost::system::error_code ignored;
        socket_.close(ignored);
    }

    std::vector<file_descriptor> received;

private:
    /// One turn moves no more than this, so that others on the executor have theirs.
    static constexpr std::size_t turn_bytes = 4u << 20;

    struct reading {
        std::span<std::byte> into;
        std::size_t least = 0, count = 0;
        stream::handler done;
    };
    struct writing {
        std::vector<iovec> pieces;
        std::size_t first = 0;  ///< piece that is not written whole
        std::size_t count = 0;
        std::vector<int> descriptors;
        stream::handler done;
    };

    static std::error_code aborted() { return boost::system::error_code(boost::asio::error::operation_aborted); }

    template <class Next>
    void wait(outcome what, Next next) {
        using socket_type = boost::asio::generic::stream_protocol::socket;
        socket_.async_wait(what == outcome::wants_read ? socket_type::wait_read : socket_type::wait_write,
                           [self = shared_from_this(), next](boost::system::error_code ec) { (*self.*next)(ec); });
    }
    template <class Next>
    void another_turn(Next next) {
        boost::asio::post(socket_.get_executor(), [self = shared_from_this(), next] { (*self.*next)({}); });
    }

    /// Waking for every packet of a large block costs more than the packet: TCP is told how many bytes are worth it. TLS may
    /// hold some of them already, a record at most. Source: SO_RCVLOWAT in socket(7).
    void wake_for(std::size_t bytes) {
        constexpr std::size_t record_bytes = 20u << 10, most_bytes = 256u << 10;
        int const wanted = bytes > 2 * record_bytes ? static_cast<int>(std::min(bytes - record_bytes, most_bytes)) : 1;
        if (!is_tcp_ || wanted == low_water_) return;
        if (::setsockopt(socket_.native_handle(), SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted) == 0) low_water_ = wanted;
    }

    void read_again(boost::system::error_code ec) { ec ? end_read(ec, false) : go_on_reading(false); }
    void write_again(boost::system::error_code ec) { ec ? end_write(ec, false) : go_on_writing(false); }

    void go_on_reading(bool inside) {
        for (std::size_t turn = 0; read_.count < read_.least || (read_.count == 0 && read_.into.empty() == false);) {
            if (closed_) return end_read(aborted(), inside);
            if (turn >= turn_bytes) return another_turn(&connection::read_again);
            auto const got = io_->read(read_.into.subspan(read_.count), received);
            switch (got.what) {
            case outcome::moved:
                read_.count += got.bytes;
                turn += got.bytes;
                break;
            case outcome::wants_read: wake_for(read_.least - std::min(read_.least, read_.count)); [[fallthrough]];
            case outcome::wants_write: return wait(got.what, &connection::read_again);
            case outcome::end: return end_read(boost::system::error_code(boost::asio::error::eof), inside);
            case outcome::failed: return end_read(got.error, inside);
            }
        }
        end_read({}, inside);
    }

    void go_on_writing(bool inside) {
        for (std::size_t turn = 0; write_.first < write_.pieces.size();) {
            if (closed_) return end_write(aborted(), inside);
            if (turn >= turn_bytes) return another_turn(&connection::write_again);
            auto const put = io_->write(std::span(write_.pieces).subspan(write_.first), write_.descriptors);
            if (put.what == outcome::wants_read || put.what == outcome::wants_write) return wait(put.what, &connection::write_again);
            if (put.what != outcome::moved) return end_write(put.error, inside);
            write_.count += put.bytes;
            turn += put.bytes;
            for (auto left = put.bytes; left > 0;) {
                auto& piece = write_.pieces[write_.first];
                auto const n = std::min(left, piece.iov_len);
                piece = {static_cast<std::byte*>(piece.iov_base) + n, piece.iov_len - n};
                left -= n;
                if (piece.iov_len == 0) ++write_.first;
            }
        }
        end_write({}, inside);
    }

    void end_read(std::error_code ec, bool inside) { call(std::exchange(read_.done, nullptr), ec, read_.count, inside); }
    void end_write(std::error_code ec, bool inside) { call(std::exchange(write_.done, nullptr), ec, write_.count, inside); }

    void call(stream::handler done, std::error_code ec, std::size_t count, bool inside) {
        if (!inside) return done(ec, count);
        boost::asio::post(socket_.get_executor(), [self = shared_from_this(), done = std::move(done), ec, count] { done(ec, count); });
    }

    boost::asio::generic::stream_protocol::socket socket_;
    std::unique_ptr<socket_io> io_;
    bool closed_ = false;
    bool const is_tcp_;
    int low_water_ = 1;
    reading read_;
    writing write_;
};

class socket_stream final : public stream {
public:
    socket_stream(boost::asio::any_io_executor executor, file_descriptor descriptor, std::unique_ptr<socket_io> io) {
        sockaddr_storage own{};
        socklen_t size = sizeof own;
        ::getsockname(descriptor.get(), reinterpret_cast<sockaddr*>(&own), &size);
        is_unix_ = own.ss_family == AF_UNIX;
        look_at_peer(descriptor.get());
        connection_ = std::make_shared<connection>(std::move(executor), own.ss_family, std::move(descriptor), std::move(io));
    }
    ~socket_stream() override { connection_->close(); }

    boost::asio::any_io_executor executor() override { return connection_->executor(); }
    void read(std::span<std::byte> into, std::size_t least, handler done) override { connection_->start_read(into, least, std::move(done)); }
    void write(std::span<std::span<std::byte const> const> pieces, handler done, std::vector<int> descriptors) override {
        connection_->start_write(pieces, std::move(done), std::move(descriptors));
    }
    void end_writing() noexcept override { connection_->end_writing(); }
    void close() noexcept override { connection_->close(); }
    bool passes_descriptors() const noexcept override { return is_unix_; }
    std::vector<file_descriptor> take_descriptors() override { return std::exchange(connection_->received, {}); }
    std::optional<uid_t> peer_uid() const noexcept override { return uid_; }
    std::string peer() const override { return peer_; }

private:
    void look_at_peer(int fd) {
        if (is_unix_) {
            ucred who{};
            socklen_t size = sizeof who;
            peer_ = "unix socket";
            if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0) return;
            uid_ = who.uid;
            peer_ += ", process " + std::to_string(who.pid);
            return;
        }
        sockaddr_storage other{};
        socklen_t size = sizeof other;
        std::array<char, NI_MAXHOST> host{};
        std::array<char, NI_MAXSERV> port{};
        if (::getpeername(fd, reinterpret_cast<sockaddr*>(&other), &size) != 0 ||
            ::getnameinfo(reinterpret_cast<sockaddr const*>(&other), size, host.data(), host.size(), port.data(), port.size(),
                          NI_NUMERICHOST | NI_NUMERICSERV) != 0)
            peer_ = "unknown address";
        else
            peer_ = std::string(host.data()) + (other.ss_family == AF_INET6 ? " port " : ":") + port.data();
    }

    std::shared_ptr<connection> connection_;
    bool is_unix_ = false;
    std::optional<uid_t> uid_;
    std::string peer_;
};

}  // namespace

std::unique_ptr<stream> make_stream(boost::asio::any_io_executor executor, file_descriptor descriptor, std::unique_ptr<socket_io> io) {
    return std::make_unique<socket_stream>(std::move(executor), std::move(descriptor), std::move(io));
}

void set_tcp_options(int descriptor) noexcept {
    auto set = [&](int level, int name, int value) { ::setsockopt(descriptor, level, name, &value, sizeof value); };
    set(IPPROTO_TCP, TCP_NODELAY, 1);
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    set(IPPROTO_TCP, TCP_KEEPIDLE, 5);
    set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
    set(IPPROTO_TCP, TCP_KEEPCNT, 2);
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, 15'000);
}

}  // namespace transport

std::unique_ptr<stream> make_stream(boost::asio::any_io_executor executor, file_descriptor descriptor, std::shared_ptr<tls_context const> tls) {
    sockaddr_storage own{};
    socklen_t size = sizeof own;
    if (::getsockname(descriptor.get(), reinterpret_cast<sockaddr*>(&own), &size) != 0 ||
        ::fcntl(descriptor.get(), F_SETFL, ::fcntl(descriptor.get(), F_GETFL) | O_NONBLOCK) != 0)
        throw_if(last_system_error(errno), "cannot use a connection");
    bool const is_unix = own.ss_family == AF_UNIX;
    if (!is_unix) transport::set_tcp_options(descriptor.get());
    auto io = tls ? transport::make_tls_io(tls, descriptor.get(), {}) : transport::make_plain_io(descriptor.get(), is_unix);
    return transport::make_stream(std::move(executor), std::move(descriptor), std::move(io));
}

}  // namespace varve::asio
