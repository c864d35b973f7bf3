#include "scratch_folder.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <optional>

#include "varve/asio/sink.hpp"
#include "varve/conformance/sink.hpp"

namespace {

void expect_lawful(varve::asio::sink_options const& options) {
    if (auto refused = varve::asio::sink::available()) return varve_test::skip("no io_uring: " + refused.message());
    varve_test::scratch_folder folder;
    varve::conformance::sink_fixture<varve::asio::sink> fixture{[&] { return varve::asio::sink(options); },
                                                                [&](int index, std::uint64_t size) { return folder.request(index, size); },
                                                                [&](auto&, int index) { return std::optional(folder.content(index)); }};
    for (auto const& law : varve::conformance::check_sink(fixture)) BOOST_ERROR(law);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(asio_conformance)

BOOST_AUTO_TEST_CASE(the_asio_sink_keeps_the_laws) { expect_lawful({}); }

BOOST_AUTO_TEST_CASE(the_asio_sink_keeps_the_laws_buffered) { expect_lawful({.direct = varve::asio::direct_io::never}); }

BOOST_AUTO_TEST_CASE(the_asio_sink_keeps_the_laws_with_a_queue_of_one_and_of_many_small_pieces) {
    expect_lawful({.queue_depth = 1});
    expect_lawful({.queue_depth = 64, .piece_bytes = 4096});
}

BOOST_AUTO_TEST_SUITE_END()
