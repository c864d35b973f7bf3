#include <varve/posix/sink.hpp>

#include <cstdio>

int main() {
    varve::posix::sink sink;
    std::puts("posix");
}
