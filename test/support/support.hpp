#pragma once

#include <string_view>

/// What the tests share. The executables get their main() from here too: a test file includes <boost/test/unit_test.hpp> and this, no more.
namespace varve_test {

/// Marks the running test case as skipped, and says why; return from it afterwards.
void skip(std::string_view why);

/// Returns whether the long repetitions are asked for (VARVE_TEST_FULL=1, which `tools/check --full` sets).
bool full();

}  // namespace varve_test
