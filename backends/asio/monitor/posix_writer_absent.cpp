#include "file_writer.hpp"

#include "varve/error.hpp"

namespace varve::asio::server {

std::unique_ptr<file_writer> make_posix_writer(unsigned, system_calls&) {
    throw error(errc::unsupported, "the kernel refuses io_uring, and the backend posix is not built; see sysctl kernel.io_uring_disabled");
}

}  // namespace varve::asio::server
