// expect: no_such_policy
//
// And what is wrong is seen.
#include <varve/concepts/sink.hpp>

using wrong = varve::no_such_policy;

int main() {}
