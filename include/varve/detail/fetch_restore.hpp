#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "varve/concepts/format.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/detail/broken_file.hpp"
#include "varve/error.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"

namespace varve::detail {

/// Reads what the sink brings back into the state, under the rules of store::restore: what turns out not to be whole is
/// passed over for the next older one.
template <fetching_sink Sink>
std::optional<restored_checkpoint> restore_fetched(Sink& sink, file_format const& format, state& s, std::optional<std::uint64_t> step,
                                                   restore_options const& options) {
    std::string last;
    bool touched = false;
    for (std::uint32_t skip = 0;; ++skip) {
        auto fetched = sink.fetch(step, skip);
        if (!fetched) break;
        try {
            auto identity = format.identify(fetched->file.get());
            if (step && identity.step != *step)
                throw error(errc::not_whole,
                            fetched->name + ": of step " + std::to_string(identity.step) + " where " + std::to_string(*step) + " was asked for");
            format.expect_same_layout(fetched->file.get(), s);
            touched = true;
            format.restore(fetched->file.get(), s, options);
            if (s.restored) s.restored();
            return restored_checkpoint{identity.step, identity.sequence, fetched->name, std::move(identity.metadata)};
        } catch (error const& e) {
            if (!tells_of_the_file(e.code())) throw;
            last = e.what();
        }
    }
    if (!step && last.empty()) return std::nullopt;
    throw error(errc::no_checkpoint, (step ? "no whole checkpoint of step " + std::to_string(*step) : std::string("no whole checkpoint is left")) +
                                         (touched ? "; the tensors are undefined" : "") + (last.empty() ? "" : "; last: " + last));
}

}  // namespace varve::detail
