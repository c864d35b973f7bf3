#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <varve/checkpointer.hpp>
#include <varve/observer.hpp>
#include <varve/scheduling/async.hpp>
#include <varve/staging/host.hpp>

#include "relaying_sink.hpp"
#include "toy_run.hpp"

namespace varve_test {

/// What was told of saves, as "milestone step".
struct recorder {
    void on(varve::event const& e) noexcept {
        if (e.what == varve::milestone::layer_ready || e.what == varve::milestone::layer_copied || e.what == varve::milestone::write) return;
        std::lock_guard lock(mutex);
        entries.push_back(std::string(name(e.what)) + " " + std::to_string(e.step));
    }
    std::ptrdiff_t at(std::string const& entry) {
        std::lock_guard lock(mutex);
        auto it = std::find(entries.begin(), entries.end(), entry);
        return it == entries.end() ? -1 : it - entries.begin();
    }
    std::mutex mutex;
    std::vector<std::string> entries;
};

/// A run of two layers, each of about one block, with a receiver that the test plays.
template <class Scheduling = varve::async<2>>
struct run {
    explicit run(varve::checkpointer_options options = {}, std::size_t pool_blocks = 8, Scheduling scheduling = {},
                 std::shared_ptr<receiver> to = std::make_shared<receiver>())
        : other(std::move(to)), model(2, floats_per_block),
          checkpointer(std::in_place, model.state(), varve::host_staging(pool_blocks * block, block), scheduling, receiving_sink(other),
                       (options.observers.add(seen), options)) {}

    varve::ticket save(std::uint64_t step) {
        checkpointer->before_update();
        model.update(step);
        return checkpointer->save(step, {{"loss", std::to_string(step)}});
    }

    recorder seen;
    std::shared_ptr<receiver> other;
    toy_model model;
    std::optional<varve::checkpointer<varve::host_staging, Scheduling, receiving_sink>> checkpointer;
};

inline varve::checkpointer_options when(varve::when_busy busy) {
    varve::checkpointer_options o;
    o.busy = busy;
    return o;
}

}  // namespace varve_test
