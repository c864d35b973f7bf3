#include "commands.hpp"
#include "errors.hpp"

namespace varve::tool {

int ls(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error("this command is not built yet"); }
int inspect(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error("this command is not built yet"); }
int verify(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error("this command is not built yet"); }
int diff(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error("this command is not built yet"); }
int restore(std::vector<std::string> const&, std::ostream&, std::ostream&) { throw usage_error("this command is not built yet"); }

}  // namespace varve::tool
