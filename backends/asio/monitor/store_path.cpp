#include "store_path.hpp"

#include <algorithm>

#include "varve/detail/text.hpp"
#include "varve/error.hpp"

namespace varve::asio::server {

namespace {

constexpr std::size_t most_name_bytes = 255;

}  // namespace

std::filesystem::path store_path(std::filesystem::path const& dir, std::string const& store, bool over_network) {
    auto refuse = [&](char const* why) -> std::filesystem::path {
        throw error(std::make_error_code(std::errc::invalid_argument), "the store '" + varve::detail::printable(store) + "' " + why);
    };
    bool const control = std::any_of(store.begin(), store.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
    if (store.empty() || control || !varve::detail::is_utf8(store)) return refuse("has no name that a folder can have");
    if (!over_network && store.front() == '/') {
        auto path = std::filesystem::weakly_canonical(store);
        // One that is not there yet keeps a slash at its end.
        return path.has_filename() ? path : path.parent_path();
    }
    if (store.find('/') != std::string::npos || store == "." || store == ".." || store.size() > most_name_bytes)
        return refuse(over_network ? "must be a name below the monitor's --dir: no path"
                                   : "must be an absolute path, or a name below the monitor's --dir");
    return std::filesystem::weakly_canonical(dir / store);
}

}  // namespace varve::asio::server
