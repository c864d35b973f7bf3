#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <varve/asio/monitor_sink.hpp>
#include <varve/checkpointer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/staging/host.hpp>

#include "fake_monitor.hpp"
#include "files.hpp"
#include "plain_sinks.hpp"

namespace varve_test {

using namespace std::chrono_literals;

inline constexpr std::size_t block = varve::block_unit_bytes;
inline constexpr std::size_t floats_per_block = block / sizeof(float);

/// A trainer whose checkpoints have three blocks, and the monitor that the test plays.
struct trainer {
    using checkpointer_type = varve::checkpointer<varve::host_staging, varve::async<2>, varve::asio::monitor_sink>;

    explicit trainer(fake_monitor& to, std::size_t pool_blocks = 8, bool shared = true)
        : monitor(to), blocks(pool_blocks), model(2, floats_per_block) {
        if (shared) pool = std::make_shared<varve::asio::shared_pool>(pool_blocks * block, block);
        options.pool = pool;
        options.files.keep = 3;
        options.connect_limit = 2s;
        options.retry_after = 1ms;
        options.goodbye_limit = 100ms;
    }
    /// The connection of the trainer, once it has said hello and was welcomed.
    std::unique_ptr<fake_connection> start(wire::welcome const& welcome = {}) {
        auto made = std::async(std::launch::async, [this] { make(); });
        auto connection = monitor.accept();
        hello = connection->greet(welcome);
        made.get();
        return connection;
    }
    void make() {
        auto staging = pool ? varve::host_staging(pool->memory(), block, pool) : varve::host_staging(blocks * block, block);
        checkpointer.emplace(model.state(), std::move(staging), varve::async<2>{}, varve::asio::monitor_sink(monitor.where(), "/data/run", options),
                             checkpointer_options);
    }
    varve::ticket save(std::uint64_t step) {
        checkpointer->before_update();
        model.update(step);
        return checkpointer->save(step, {{"loss", std::to_string(step)}});
    }
    std::string file_of(std::uint64_t step) { return checkpoint_bytes(model.state(), {step, 1, {{"loss", std::to_string(step)}}}); }
    bool holds(std::vector<std::byte> const& image, std::uint64_t step) {
        auto const file = file_of(step);
        return image.size() == file.size() &&
               std::memcmp(image.data() + hello.header_bytes, file.data() + hello.header_bytes, file.size() - hello.header_bytes) == 0;
    }

    fake_monitor& monitor;
    std::size_t blocks;
    toy_model model;
    std::shared_ptr<varve::asio::shared_pool> pool;
    varve::asio::monitor_sink_options options;
    varve::checkpointer_options checkpointer_options;
    wire::hello hello;
    std::optional<checkpointer_type> checkpointer;
};

struct at_socket {
    temporary_folder folder;
    fake_monitor monitor{folder.path() / "socket"};
};

}  // namespace varve_test
