// expect: varve: a format must derive from varve::file_format
#include "varve/concepts/format.hpp"

struct wrong {};

static_assert(varve::explain_format<wrong>());

int main() {}
