#include <varve/gds/sink.hpp>
#include <varve/gds/staging.hpp>

#include <cstdio>

int main() {
    // There may be no GPU here, and no cuFile: that the library is found and linked is what counts.
    static_assert(varve::digesting_staging<varve::gds::staging>);
    if (varve::gds::sink::available() == varve::errc::no_checkpoint) return 1;
    std::puts("gds");
}
