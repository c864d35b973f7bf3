#include "commands.hpp"
#include "errors.hpp"
#include "probe.hpp"

namespace varve::tool {

int probe(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error("this command is not built yet"); }
nlohmann::json measure_limits(std::filesystem::path const&, std::uint64_t, std::ostream*) { throw usage_error("varve probe is not built yet"); }

}  // namespace varve::tool
