#include "all_headers.hpp"

namespace odr {
int second();
int second() { return 1; }
}  // namespace odr
