// main() of every Boost.Test executable: counts the cases and says so in the last line, `N passed, N failed, N skipped`, which
// tools/check adds up. Exits 77 (what Meson reads as skipped) when everything that could run was skipped.

#include "support.hpp"

#define BOOST_TEST_NO_MAIN
#define BOOST_TEST_ALTERNATIVE_INIT_API
#include <boost/test/results_collector.hpp>
#include <boost/test/tree/observer.hpp>
#include <boost/test/tree/test_case_counter.hpp>
#include <boost/test/tree/traverse.hpp>
#include <boost/test/unit_test.hpp>

#include <cstdio>
#include <cstdlib>

namespace {

namespace ut = boost::unit_test;

bool skip_asked = false;

class counter : public ut::test_observer {
public:
    void test_unit_start(ut::test_unit const&) override { skip_asked = false; }

    void test_unit_finish(ut::test_unit const& unit, unsigned long) override {
        if (unit.p_type != ut::TUT_CASE) {
            return;
        }
        auto const& result = ut::results_collector.results(unit.p_id);
        if (!result.passed()) {
            ++failed;
        } else if (skip_asked) {
            ++skipped;
        } else {
            ++passed;
        }
        skip_asked = false;
    }

    void test_unit_skipped(ut::test_unit const& unit, ut::const_string reason) override {
        std::fprintf(stderr, "skipped: %s: %.*s\n", unit.full_name().c_str(), static_cast<int>(reason.size()), reason.begin());
        ut::test_case_counter cases;
        ut::traverse_test_tree(unit, cases, true);
        skipped += cases.p_count;
    }

    // After the results collector.
    int priority() override { return 100; }

    unsigned long passed = 0;
    unsigned long failed = 0;
    unsigned long skipped = 0;
};

counter the_counter;

bool init() {
    ut::framework::register_observer(the_counter);
    return true;
}

}  // namespace

void varve_test::skip(std::string_view why) {
    std::fprintf(stderr, "skipped: %s: %.*s\n", ut::framework::current_test_case().full_name().c_str(), static_cast<int>(why.size()), why.data());
    skip_asked = true;
}

bool varve_test::full() {
    char const* value = std::getenv("VARVE_TEST_FULL");
    return value != nullptr && *value != '\0' && *value != '0';
}

int main(int argc, char** argv) {
    int const status = ut::unit_test_main(&init, argc, argv);
    std::printf("%lu passed, %lu failed, %lu skipped\n", the_counter.passed, the_counter.failed, the_counter.skipped);
    if (status == 0 && the_counter.passed == 0 && the_counter.skipped > 0) {
        return 77;
    }
    return status;
}
