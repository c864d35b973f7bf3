// expect: varve: at least one save must be in flight
#include <varve/scheduling/async.hpp>

varve::async<0> wrong;

int main() {}
