#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <cstdlib>

BOOST_AUTO_TEST_SUITE(support)

BOOST_AUTO_TEST_CASE(the_long_repetitions_are_asked_for_by_the_environment) {
    ::setenv("VARVE_TEST_FULL", "1", 1);
    BOOST_TEST(varve_test::full());
    ::setenv("VARVE_TEST_FULL", "0", 1);
    BOOST_TEST(!varve_test::full());
    ::unsetenv("VARVE_TEST_FULL");
    BOOST_TEST(!varve_test::full());
}

BOOST_AUTO_TEST_SUITE_END()
