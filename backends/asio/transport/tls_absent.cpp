#include "varve/error.hpp"

#include "socket_io.hpp"

namespace varve::asio {

class tls_context {};

std::shared_ptr<tls_context const> load_tls(tls_files const&, bool) {
    throw error(errc::unsupported, "TLS is not built: this build has no OpenSSL (libssl-dev); connect through a Unix socket or a loopback address");
}

namespace transport {

std::unique_ptr<socket_io> make_tls_io(std::shared_ptr<tls_context const> const&, int, std::string const&) {
    throw error(errc::unsupported, "TLS is not built");
}

}  // namespace transport

}  // namespace varve::asio
