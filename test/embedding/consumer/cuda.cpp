#include <varve/cuda/pinned_staging.hpp>

#include <cstdio>

int main() {
    // There may be no GPU here; that the library is found and linked is what counts.
    static_assert(varve::staging<varve::cuda::pinned_staging>);
    std::puts("cuda");
}
