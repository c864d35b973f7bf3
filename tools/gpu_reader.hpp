#pragma once

#include <functional>
#include <memory>
#include <string>

#include "varve/asio/monitor/monitor.hpp"

namespace varve::tool {

/// What a monitor reads its trainers' GPU memory with (see asio::monitor_options::device_memory); empty in a build without CUDA.
std::function<std::unique_ptr<asio::device_reader>(file_descriptor, std::uint64_t, std::string const&)> gpu_reader();

}  // namespace varve::tool
