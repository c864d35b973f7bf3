#pragma once

#include <iosfwd>
#include <string>
#include <vector>

namespace varve::tool {

/// The hidden command `varve bench-run`: runs one method once in this process. Standard input holds a JSON object with
/// `settings` (sections), `method`, `store` (folder); the measured values go to descriptor 3 as JSON.
int bench_run(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);

}  // namespace varve::tool
