#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "varve/concepts/format.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/detail/broken_file.hpp"
#include "varve/detail/restore_file.hpp"
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
            if (step)
                if (auto const of = format.identify(fetched->file.get()).step; of != *step)
                    throw error(errc::not_whole,
                                fetched->name + ": of step " + std::to_string(of) + " where " + std::to_string(*step) + " was asked for");
            auto identity = restore_file(format, fetched->file.get(), s, options, touched);
            touched = true;
            if (s.restored) s.restored();
            return restored_checkpoint{identity.step, identity.sequence, fetched->name, std::move(identity.metadata)};
        } catch (error const& e) {
            if (!tells_of_the_file(e.code())) throw error(e.code(), e.what() + undefined_if(touched));
            last = e.what();
        }
    }
    if (!step && last.empty()) return std::nullopt;
    throw error(errc::no_checkpoint, (step ? "no whole checkpoint of step " + std::to_string(*step) : std::string("no whole checkpoint is left")) +
                                         undefined_if(touched) + (last.empty() ? "" : "; last: " + last));
}

}  // namespace varve::detail
