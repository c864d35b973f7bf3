#include "file_writer.hpp"
#include "varve/posix/sink.hpp"

namespace varve::asio::server {

std::unique_ptr<file_writer> make_posix_writer(unsigned writes_at_once, system_calls& calls) {
    posix::sink_options options;
    options.calls = &calls;
    if (writes_at_once > 0) options.writer_threads = writes_at_once;
    return std::make_unique<writer_of<posix::sink>>(posix::sink(options));
}

}  // namespace varve::asio::server
