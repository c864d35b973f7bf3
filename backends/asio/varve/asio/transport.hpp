#pragma once

#include <boost/asio/any_io_executor.hpp>

#include <sys/types.h>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "varve/system.hpp"

namespace varve::asio {

/// Where a monitor listens: a Unix socket's path, or a host and a port.
struct address {
    std::filesystem::path path;  ///< empty for TCP
    std::string host;            ///< a name, an IPv4 address, or an IPv6 address without its brackets
    std::uint16_t port = 0;      ///< 0 lets the kernel choose, for a listener

    bool is_unix() const noexcept { return !path.empty(); }
    /// "unix:PATH" or "tcp:HOST:PORT".
    std::string text() const;
};

/// Reads what text() gives; throws std::errc::invalid_argument with one line.
address parse_address(std::string_view text);

/// The certificates of TLS 1.3, as PEM files: either side shows one and checks that the other's is signed by `authority`;
/// the client also checks that it names the host.
struct tls_files {
    std::filesystem::path certificate, key, authority;
};

/// What connections over TLS share. Made by load_tls.
class tls_context;

/// Throws error: errc::unsupported where this build has no OpenSSL, std::errc::invalid_argument for files that don't do.
std::shared_ptr<tls_context const> load_tls(tls_files const& files, bool server);

/// An open connection as bytes in order, whatever carries them.
///
/// All members are called on the executor that it was made with, one read and one write at a time; handlers run there too,
/// never inside the call. Destroying it closes the connection; pending handlers are called then with
/// boost::asio::error::operation_aborted.
class stream {
public:
    using handler = std::function<void(std::error_code, std::size_t)>;

    virtual ~stream() = default;
    stream() = default;
    stream(stream const&) = delete;
    stream& operator=(stream const&) = delete;

    virtual boost::asio::any_io_executor executor() = 0;
    /// Reads at least `least` and at most `into.size()` bytes; `into` stays valid until the handler runs. The end of the
    /// stream is boost::asio::error::eof, with the count of bytes that came before it.
    virtual void read(std::span<std::byte> into, std::size_t least, handler done) = 0;
    /// Writes all bytes of all pieces; the bytes stay valid until the handler runs (the list of pieces is copied). The
    /// descriptors go along with the first byte, where passes_descriptors(); they may be closed once the handler runs.
    virtual void write(std::span<std::span<std::byte const> const> pieces, handler done, std::vector<int> descriptors = {}) = 0;
    /// Ends this side of a Unix socket: the other reads to its end, and what it says still comes.
    virtual void end_writing() noexcept = 0;
    /// Ends the connection: what is pending ends with operation_aborted. May be called again.
    virtual void close() noexcept = 0;

    /// Whether descriptors can go along: a Unix socket.
    virtual bool passes_descriptors() const noexcept = 0;
    /// The descriptors that came with bytes read so far, in order, and not yet taken.
    virtual std::vector<file_descriptor> take_descriptors() = 0;
    /// Who is at the other end of a Unix socket (SO_PEERCRED). Source: unix(7).
    virtual std::optional<uid_t> peer_uid() const noexcept = 0;
    /// One line for messages: "unix socket, process 4711" or "127.0.0.1:5000".
    virtual std::string peer() const = 0;
};

/// Takes `descriptor` (a connected stream socket of either kind; with `tls` a TCP one) over as a stream.
std::unique_ptr<stream> make_stream(boost::asio::any_io_executor executor, file_descriptor descriptor,
                                    std::shared_ptr<tls_context const> tls = nullptr);

/// Connects, with TLS where `tls` is there, and blocks for at most `limit`; the executor need not run meanwhile. TCP without TLS
/// goes to a loopback address alone (std::errc::operation_not_permitted otherwise). Throws error with one line: where, why.
std::unique_ptr<stream> connect(boost::asio::any_io_executor executor, address const& to, std::shared_ptr<tls_context const> tls,
                                std::chrono::milliseconds limit);

/// Accepts connections. A Unix socket has mode 0600; one that a dead process left is replaced, one that is listened to is
/// refused with std::errc::address_in_use, and what is no socket is left alone. Its file is removed with the listener.
class listener {
public:
    /// Throws error with one line; std::errc::operation_not_permitted for TCP without TLS on an address that is not loopback.
    listener(boost::asio::any_io_executor executor, address const& at, std::shared_ptr<tls_context const> tls);
    ~listener();
    listener(listener const&) = delete;
    listener& operator=(listener const&) = delete;

    /// Waits for the next connection and makes its stream on `executor`. A TLS handshake is a part of the first read or write.
    void accept(boost::asio::any_io_executor executor, std::function<void(std::error_code, std::unique_ptr<stream>)> done);
    void close() noexcept;
    /// Where it listens, with the port that the kernel chose.
    address const& where() const noexcept;

private:
    class impl;
    std::shared_ptr<impl> impl_;
};

}  // namespace varve::asio
