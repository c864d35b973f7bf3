#include "file_writer.hpp"

#include "varve/error.hpp"
#include "varve/uring/sink.hpp"

namespace varve::asio::server {

std::unique_ptr<file_writer> make_file_writer(unsigned writes_at_once, system_calls& calls) {
    if (uring::sink::available()) return make_posix_writer(writes_at_once, calls);
    uring::sink_options options;
    options.calls = &calls;
    if (writes_at_once > 0) options.queue_depth = writes_at_once;
    return std::make_unique<writer_of<uring::sink>>(uring::sink(options));
}

}  // namespace varve::asio::server
