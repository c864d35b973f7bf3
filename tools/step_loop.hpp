#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include "methods.hpp"
#include "trainer.hpp"

namespace varve::tool {

/// The update of a step whose gradients stand, with a save where `due`: the one loop of DESIGN section 3. `method` may be null.
/// Returns the save's ticket.
inline std::optional<ticket> update_and_save(trainer& t, running_method* method, std::uint64_t step, bool due, float loss) {
    if (!method) {
        t.update();
        return std::nullopt;
    }
    if (due) method->begin(step);
    if (due && method->updates_by_layer()) {
        t.update_by_layer(*method);
    } else {
        method->before_update();
        t.update();
    }
    if (!due) return std::nullopt;
    // Nothing here may depend on the time or the host: a run that was resumed writes the same bytes.
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(loss));
    return method->seal({{"loss", digits}});
}

}  // namespace varve::tool
