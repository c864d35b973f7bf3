#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include "methods.hpp"
#include "phase.hpp"
#include "trainer.hpp"

namespace varve::tool {

/// What the settings say to a method.
inline method_settings method_settings_of(settings const& s, observer_list const& observers) {
    constexpr std::uint64_t mb = 1'000'000;
    method_settings m;
    m.num_threads = static_cast<unsigned>(s.pccheck.num_threads);
    m.max_async = s.pccheck.max_async;
    m.buffer_bytes = s.pccheck.buffer_size_mb * mb;
    m.batch_bytes = s.pccheck.batch_size_mb * mb;
    m.pool_bytes = s.run.pool_size_mb * mb;
    m.snapshots = s.run.gpu_snapshot == "off" ? 0 : 2;
    m.busy = busy_mode(s);
    m.keep = s.run.keep;
    m.keep_every = s.run.keep_every;
    m.prepare = preparation(s);
    m.durable_interval = std::chrono::ceil<std::chrono::milliseconds>(std::chrono::duration<double>(s.run.durable_interval));
    m.observers = observers;
    return m;
}

/// The update of a step whose gradients stand, with a save where `due`: the one loop of varve::checkpointer. `method` may be null.
/// Returns the save's ticket.
inline std::optional<ticket> update_and_save(trainer& t, running_method* method, std::uint64_t step, bool due, float loss) {
    if (!method) {
        phase in_update("update");
        t.update();
        return std::nullopt;
    }
    // A save that training waits for does not begin with the rest of the backward pass: that is the step's time.
    if (due && method->waits_at_seal()) t.synchronize();
    if (due) method->begin(step);
    if (due && method->updates_by_layer()) {
        phase in_update("update by layer");
        t.update_by_layer(*method);
    } else {
        phase in_update("update");
        method->before_update();
        t.update();
    }
    if (!due) return std::nullopt;
    phase in_save("seal");
    // Nothing here may depend on the time or the host: a run that was resumed writes the same bytes.
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(loss));
    return method->seal({{"loss", digits}, {"update", t.update_kernels()}});
}

}  // namespace varve::tool
