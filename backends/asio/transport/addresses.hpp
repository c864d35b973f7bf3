#pragma once

#include <netdb.h>
#include <sys/un.h>
#include <filesystem>
#include <memory>

#include "varve/asio/transport.hpp"

namespace varve::asio::transport {

using resolved_addresses = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

/// Throws std::errc::filename_too_long.
sockaddr_un unix_address(std::filesystem::path const& path);
/// Throws std::errc::address_not_available.
resolved_addresses resolve(address const& a, bool to_listen);
/// TCP without certificates stays on this machine: throws std::errc::operation_not_permitted.
void expect_loopback(address const& a, sockaddr const* found);

}  // namespace varve::asio::transport
