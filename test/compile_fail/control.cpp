// compiles
//
// The flags are right and the headers are found: whatever else fails in this folder fails for its own fault.
#include <varve/concepts/sink.hpp>

int main() {}
