#pragma once

#include <boost/asio/any_io_executor.hpp>

#include <sys/uio.h>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "varve/asio/transport.hpp"
#include "varve/system.hpp"

namespace varve::asio::transport {

/// What one attempt on a socket that never blocks came to.
enum class outcome { moved, wants_read, wants_write, end, failed };

struct attempt {
    outcome what = outcome::moved;
    std::size_t bytes = 0;
    std::error_code error{};
};

/// How bytes go through a socket that never blocks.
class socket_io {
public:
    virtual ~socket_io() = default;
    /// Reads what is there; descriptors that came along are added to `received`.
    virtual attempt read(std::span<std::byte> into, std::vector<file_descriptor>& received) noexcept = 0;
    /// Writes what goes; descriptors that went along are taken off the front of `descriptors`.
    virtual attempt write(std::span<iovec const> pieces, std::vector<int>& descriptors) noexcept = 0;
    /// Says farewell where the protocol has one, without waiting.
    virtual void end() noexcept {}
    /// Goes on with what must come before the first byte; `moved` once it is done.
    virtual attempt greet() noexcept { return {}; }
};

/// `host` is what a client wants the other's certificate to name; empty for a server.
std::unique_ptr<socket_io> make_tls_io(std::shared_ptr<tls_context const> const& tls, int descriptor, std::string const& host);
std::unique_ptr<socket_io> make_plain_io(int descriptor, bool passes_descriptors);

std::unique_ptr<stream> make_stream(boost::asio::any_io_executor executor, file_descriptor descriptor, std::unique_ptr<socket_io> io);

/// Low latency, and a peer that is gone without a word is found within 15 seconds. Source: tcp(7).
void set_tcp_options(int descriptor) noexcept;

}  // namespace varve::asio::transport
