#include "file_writer.hpp"

namespace varve::asio::server {

std::unique_ptr<file_writer> make_file_writer(unsigned writes_at_once, system_calls& calls) { return make_posix_writer(writes_at_once, calls); }

}  // namespace varve::asio::server
