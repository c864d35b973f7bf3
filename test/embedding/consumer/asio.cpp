#include <varve/asio/sink.hpp>

#include <cstdio>

int main() {
    // A machine may refuse io_uring; that Boost.Asio is found and io_uring is linked is what counts here.
    if (!varve::asio::sink::available()) varve::asio::sink sink;
    std::puts("asio");
}
