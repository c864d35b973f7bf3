#include <varve/uring/sink.hpp>

#include <cstdio>

int main() {
    // A machine may refuse io_uring; that the library is found and linked is what counts here.
    io_uring ring{};
    if (io_uring_queue_init(4, &ring, 0) == 0) io_uring_queue_exit(&ring);
    std::puts("uring");
}
