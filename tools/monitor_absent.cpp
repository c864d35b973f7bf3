#include "commands.hpp"
#include "errors.hpp"
#include "monitor_process.hpp"

namespace varve::tool {

namespace {

constexpr char const* not_built = "the monitor is not built: it needs the backend asio (Boost 1.78 or newer, and liburing)";

}  // namespace

int monitor(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error(not_built); }

class monitor_of_run::impl {};
std::string monitor_of_run::name_of_its_own(std::filesystem::path const&) { return {}; }
monitor_of_run::monitor_of_run(settings const&, std::filesystem::path const&, std::uint64_t, std::function<void(std::string const&)>,
                               std::string const&) {
    throw usage_error(not_built);
}
monitor_of_run::~monitor_of_run() = default;
std::unique_ptr<running_method> monitor_of_run::start(method_entry const&, libtorch::training_state&, method_settings) { return nullptr; }
bool monitor_of_run::is_over_tcp() const { return false; }
bool monitor_of_run::is_external() const { return false; }
void monitor_of_run::end() {}

}  // namespace varve::tool
