#include "scratch_folder.hpp"
#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <optional>

#include "varve/conformance/sink.hpp"
#include "varve/posix/sink.hpp"
#include "varve/sink/memory.hpp"
#include "varve/sink/null.hpp"

namespace {

template <varve::sink Sink>
void expect_lawful(varve::conformance::sink_fixture<Sink> const& fixture) {
    for (auto const& law : varve::conformance::check_sink<Sink>(fixture)) BOOST_ERROR(law);
}

template <varve::file_sink Sink, class Options>
void expect_lawful_files(Options const& options) {
    varve_test::scratch_folder folder;
    expect_lawful<Sink>({[&] { return Sink(options); }, [&](int index, std::uint64_t size) { return folder.request(index, size); },
                         [&](Sink&, int index) { return std::optional(folder.content(index)); }});
}

}  // namespace

BOOST_AUTO_TEST_SUITE(sink_conformance)

BOOST_AUTO_TEST_CASE(the_null_sink_keeps_the_laws) {
    expect_lawful<varve::null_sink>({[] { return varve::null_sink(); }, [](int, std::uint64_t size) { return varve::open_request{-1, {}, size}; },
                                     [](auto&, int) { return std::nullopt; }});
}

BOOST_AUTO_TEST_CASE(the_memory_sink_keeps_the_laws) {
    expect_lawful<varve::memory_sink>({[] { return varve::memory_sink(); }, [](int, std::uint64_t size) { return varve::open_request{-1, {}, size}; },
                                       [](varve::memory_sink& s, int) { return std::optional(*s.newest()); }});
}

BOOST_AUTO_TEST_CASE(the_posix_sink_keeps_the_laws) { expect_lawful_files<varve::posix::sink>(varve::posix::sink_options{}); }

BOOST_AUTO_TEST_CASE(the_posix_sink_keeps_the_laws_buffered) {
    expect_lawful_files<varve::posix::sink>(varve::posix::sink_options{.direct = varve::posix::direct_io::never});
}

BOOST_AUTO_TEST_CASE(the_posix_sink_keeps_the_laws_with_one_thread_and_with_many) {
    expect_lawful_files<varve::posix::sink>(varve::posix::sink_options{.writer_threads = 1});
    expect_lawful_files<varve::posix::sink>(varve::posix::sink_options{.writer_threads = 16, .stripe_bytes = 4096});
}

BOOST_AUTO_TEST_SUITE_END()
