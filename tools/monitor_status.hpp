#pragma once

#include <iosfwd>
#include <memory>
#include <string>

#include "varve/asio/transport.hpp"

namespace varve::tool {

/// The certificates of the options --cert, --key and --ca; throws usage_error for files that don't do, or where TLS is not built.
std::shared_ptr<asio::tls_context const> load_monitor_tls(std::string const& certificate, std::string const& key, std::string const& authority,
                                                          bool server);

/// The JSON that the monitor there answers a STATUS message with. Throws error where there is none.
std::string monitor_status(asio::address const& at, std::shared_ptr<asio::tls_context const> const& tls);

/// `varve monitor --status`; returns the exit code.
int print_monitor_status(asio::address const& at, std::shared_ptr<asio::tls_context const> const& tls, bool as_json, std::ostream& out);

}  // namespace varve::tool
