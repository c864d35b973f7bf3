#include "all_headers.hpp"

#include <cstdio>

namespace odr {
int second();
}

int main() { std::printf("%d passed, 0 failed, 0 skipped\n", odr::second()); }
