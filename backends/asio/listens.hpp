#pragma once

#include <boost/asio/io_context.hpp>

#include <chrono>

#include "varve/asio/transport.hpp"

namespace varve_test {

/// Whether somebody listens there.
inline bool listens(varve::asio::address const& at) try {
    boost::asio::io_context context;
    varve::asio::connect(context.get_executor(), at, nullptr, std::chrono::seconds(2));
    return true;
} catch (varve::error const&) {
    return false;
}

}  // namespace varve_test
