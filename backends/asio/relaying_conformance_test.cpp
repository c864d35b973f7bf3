#include "support.hpp"

#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <filesystem>

#include <varve/asio/monitor_sink.hpp>
#include <varve/conformance/relaying_sink.hpp>

#include "files.hpp"
#include "monitor_workplace.hpp"

namespace {

using namespace varve_test;
using varve::asio::monitor_sink;
using laws = varve::conformance::detail::relaying_laws<monitor_sink>;

void keeps_the_laws(bool unix_socket, bool shared) {
    workplace w(unix_socket);
    auto pool = std::make_shared<varve::asio::shared_pool>(laws::blocks * laws::block_bytes, laws::block_bytes);
    int stores = 0;
    varve::conformance::relaying_fixture<monitor_sink> fixture;
    fixture.memory = pool->memory();
    fixture.make = [&] {
        varve::asio::monitor_sink_options o;
        if (shared) o.pool = pool;
        o.files.prepare = varve::prepare_mode::none;
        return monitor_sink(w.monitor->where(), "run" + std::to_string(++stores), o);
    };
    fixture.read_back = [&](std::uint64_t step) -> std::optional<std::vector<std::byte>> {
        auto const path = w.file(step, "run" + std::to_string(stores));
        BOOST_TEST_CONTEXT(path.string()) BOOST_CHECK_NO_THROW(varve::safetensors().verify(open_file(path).get(), 1));
        auto const content = read_file(path);
        auto const bytes = std::as_bytes(std::span(content));
        return std::vector<std::byte>(bytes.begin(), bytes.end());
    };
    for (auto const& law : varve::conformance::check_relaying_sink<monitor_sink>(fixture)) BOOST_ERROR(law);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(relaying_conformance)

BOOST_AUTO_TEST_CASE(the_monitor_sink_keeps_the_laws_as_payload) { keeps_the_laws(true, false); }
BOOST_AUTO_TEST_CASE(the_monitor_sink_keeps_the_laws_over_tcp) { keeps_the_laws(false, false); }
BOOST_AUTO_TEST_CASE(the_monitor_sink_keeps_the_laws_by_reference) { keeps_the_laws(true, true); }

BOOST_AUTO_TEST_SUITE_END()
