#pragma once

#include <boost/test/unit_test.hpp>

#include <cerrno>
#include <string>

#include "refused_rings.hpp"
#include "sink_faults.hpp"
#include "support.hpp"
#include "varve/error.hpp"

namespace varve_test {

/// Runs a test of the faults that all file sinks share, where the kernel gives `Sink` its ring at all.
template <class Sink, class Test>
void with_rings(Test test) {
    if (auto refused = Sink::available()) return skip("no io_uring: " + refused.message());
    sink_faults faults([](varve::system_calls& calls) { return Sink({.calls = &calls}); });
    test(faults);
}

/// What a sink over io_uring does where the kernel refuses it.
template <class Sink>
void a_refused_ring_is_unsupported_and_says_so() {
    if (auto refused = Sink::available()) return skip("no io_uring: " + refused.message());
    for (int why : {EPERM, ENOSYS}) {
        int status = in_a_child([why] {
            auto before = open_descriptors();
            if (!refuse_rings(why)) return 77;
            if (!is(Sink::available(), why)) return 1;
            try {
                Sink sink;
                return 2;
            } catch (varve::error const& e) {
                if (e.code() != varve::errc::unsupported || std::string(e.what()).find("use the posix sink") == std::string::npos) return 3;
            }
            return open_descriptors() == before ? 0 : 4;
        });
        if (status == 77) return skip("no seccomp filters here");
        BOOST_TEST(status == 0);
    }
}

}  // namespace varve_test
