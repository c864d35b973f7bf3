#pragma once

#include <memory>
#include <string>

#include "methods.hpp"

namespace varve::tool {

/// torch.save: one thread, through the page cache, everything stops. Needs the backend posix, as the next one does.
std::unique_ptr<running_method> start_traditional(libtorch::training_state& training, method_settings const& s, bool durable);

/// PCcheck: N saves in flight, all of them writing.
std::unique_ptr<running_method> start_original(libtorch::training_state& training, method_settings const& s);

/// `staging` is host, pinned or gds; empty for what suits the state: pinned where it lies in GPU memory. Throws usage_error
/// for parts that do not run here.
std::unique_ptr<running_method> start_combination(libtorch::training_state& training, method_settings const& s, std::string const& staging,
                                                  std::string const& scheduling, std::string const& sink);

}  // namespace varve::tool
