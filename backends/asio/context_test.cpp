#include "sink_faults.hpp"
#include "support.hpp"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>

#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "varve/asio/sink.hpp"
#include "varve/checkpointer.hpp"
#include "varve/conformance/sink.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/staging/host.hpp"

namespace {

std::atomic<std::size_t> allocations{0};

/// An io_context of the user's, run by threads of the user's.
class users_context {
public:
    explicit users_context(int threads) {
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { context_.run(); });
    }
    ~users_context() {
        work_.reset();
        for (auto& t : threads_) t.join();
    }
    boost::asio::io_context* get() { return &context_; }
    bool runs_here() const {
        for (auto const& t : threads_)
            if (t.get_id() == std::this_thread::get_id()) return true;
        return false;
    }

private:
    boost::asio::io_context context_;
    boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_{context_.get_executor()};
    std::vector<std::thread> threads_;
};

bool no_files() {
    auto refused = varve::asio::sink::available();
    if (refused) varve_test::skip("no io_uring: " + refused.message());
    return static_cast<bool>(refused);
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
    ++allocations;
    if (void* p = std::malloc(size)) return p;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

BOOST_AUTO_TEST_SUITE(asio_context)

BOOST_AUTO_TEST_CASE(on_a_context_of_the_users_the_sink_keeps_the_laws) {
    if (no_files()) return;
    for (int threads : {1, 4}) {
        users_context context(threads);
        varve_test::scratch_folder folder;
        varve::conformance::sink_fixture<varve::asio::sink> fixture{[&] { return varve::asio::sink({.context = context.get()}); },
                                                                    [&](int index, std::uint64_t size) { return folder.request(index, size); },
                                                                    [&](auto&, int index) { return std::optional(folder.content(index)); }};
        for (auto const& law : varve::conformance::check_sink(fixture)) BOOST_ERROR(law);
    }
}

BOOST_AUTO_TEST_CASE(many_threads_write_on_a_context_that_many_threads_run) {
    if (no_files()) return;
    users_context context(4);
    varve_test::sink_faults faults([&](varve::system_calls& calls) {
        return varve::asio::sink({.queue_depth = 3, .piece_bytes = 16u << 10, .context = context.get(), .calls = &calls});
    });
    faults.many_threads_write_many_blocks();
    faults.torn_writes_are_resumed();
}

BOOST_AUTO_TEST_CASE(completions_run_on_the_users_threads_and_nothing_before_the_context_runs) {
    if (no_files()) return;
    varve_test::scratch_folder folder;
    auto bytes = varve_test::some_bytes(1u << 20);
    boost::asio::io_context context;
    varve::asio::sink sink({.context = &context});
    BOOST_TEST(sink.describe().find("on the caller's io_context") != std::string::npos);
    auto target = sink.open(folder.request(0, bytes.size()));
    struct answer {
        std::thread::id where;
        int times = 0;
        std::error_code error{};
    } a;
    target.write(0, {bytes.data(), bytes.size()},
                 {[](void* to, std::error_code e) noexcept {
                      auto& x = *static_cast<answer*>(to);
                      x = {std::this_thread::get_id(), x.times + 1, e};
                  },
                  &a});
    BOOST_TEST(a.times == 0);
    context.run();  // returns: the write was all there was to do
    BOOST_TEST(a.times == 1);
    BOOST_TEST(!a.error);
    BOOST_TEST((a.where == std::this_thread::get_id()));
    BOOST_TEST(varve_test::holds(folder, bytes));
}

BOOST_AUTO_TEST_CASE(a_sink_may_go_inside_the_last_completion_on_a_context_of_the_users) {
    if (no_files()) return;
    varve_test::scratch_folder folder;
    auto bytes = varve_test::some_bytes(64u << 10);
    boost::asio::io_context context;
    for (int i = 0; i < 20; ++i) {
        struct both {
            varve::asio::sink sink;
            std::optional<varve::asio::sink::target_type> target;
        };
        auto* b = new both{varve::asio::sink({.context = &context}), {}};
        b->target.emplace(b->sink.open(folder.request(0, bytes.size())));
        b->target->write(0, {bytes.data(), bytes.size()}, {[](void* to, std::error_code) noexcept { delete static_cast<both*>(to); }, b});
        context.run();
        context.restart();
        BOOST_TEST(varve_test::holds(folder, bytes));
    }
}

BOOST_AUTO_TEST_CASE(a_write_allocates_nothing) {
    if (no_files()) return;
    varve_test::scratch_folder folder;
    auto bytes = varve_test::some_bytes(4u << 20);
    varve::asio::sink sink({.piece_bytes = 64u << 10});
    auto target = sink.open(folder.request(0, bytes.size()));
    auto write = [&] {
        std::binary_semaphore came{0};
        target.write(0, {bytes.data(), bytes.size()},
                     {[](void* to, std::error_code) noexcept { static_cast<std::binary_semaphore*>(to)->release(); }, &came});
        came.acquire();
    };
    for (int i = 0; i < 3; ++i) write();
    auto before = allocations.load();
    for (int i = 0; i < 10; ++i) write();
    BOOST_TEST(allocations.load() == before);
}

BOOST_AUTO_TEST_CASE(a_sink_can_be_assigned_over_another) {
    if (no_files()) return;
    varve_test::scratch_folder folder;
    auto bytes = varve_test::some_bytes(100'000);
    varve::asio::sink sink, other;
    sink = std::move(other);
    auto target = sink.open(folder.request(0, bytes.size()));
    BOOST_TEST(!varve_test::write_and_wait(target, 0, bytes.bytes()));
    BOOST_TEST(varve_test::holds(folder, bytes));
}

BOOST_AUTO_TEST_CASE(checkpoints_come_back_on_either_context) {
    if (no_files()) return;
    users_context context(2);
    for (auto* where : {static_cast<boost::asio::io_context*>(nullptr), context.get()}) {
        varve_test::scratch_folder folder;
        std::vector<float> weights(1'500'000), moments(700'001);
        varve::state state;
        state.layers.push_back({"linear", {{"linear.weight", varve::dtype::F32, {1500, 1000}, weights.data(), {}, varve::memory_kind::host}}});
        state.layers.push_back({"run", {{"moments", varve::dtype::F32, {700'001}, moments.data(), {}, varve::memory_kind::host}}});
        auto fill = [&](float with) {
            for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = with + static_cast<float>(i);
            for (std::size_t i = 0; i < moments.size(); ++i) moments[i] = with - static_cast<float>(i);
        };
        auto const place = folder.path() / "store";
        {
            varve::checkpointer ck(state, varve::host_staging(16u << 20, varve::block_unit_bytes), varve::async<2>{},
                                   varve::asio::sink({.context = where}), place);
            for (std::uint64_t step = 1; step <= 5; ++step) {
                ck.before_update();
                fill(static_cast<float>(step));
                ck.save(step);
            }
        }
        auto const saved = std::pair(weights, moments);
        fill(-1);
        varve::checkpointer ck(state, varve::host_staging(16u << 20, varve::block_unit_bytes), varve::async<2>{},
                               varve::asio::sink({.context = where}), place);
        auto restored = ck.restore();
        BOOST_TEST_REQUIRE(restored.has_value());
        BOOST_TEST(restored->step == 5u);
        BOOST_TEST((std::pair(weights, moments) == saved));
    }
}

BOOST_AUTO_TEST_SUITE_END()
