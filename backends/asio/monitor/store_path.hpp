#pragma once

#include <filesystem>
#include <string>

namespace varve::asio::server {

/// The folder of the store that a HELLO names: a name below `dir`, or, but for one who comes over the network, an absolute path.
/// Two names of one folder have one path. Throws error with std::errc::invalid_argument for what is neither.
std::filesystem::path store_path(std::filesystem::path const& dir, std::string const& store, bool over_network);

}  // namespace varve::asio::server
