#pragma once

#include <iosfwd>
#include <string>
#include <vector>

/// The subcommands: each gets what follows its name and returns the exit code; what goes wrong it throws.
namespace varve::tool {

int bench(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int train(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int monitor(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int probe(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int ls(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int inspect(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int verify(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int diff(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int restore(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);
int report(std::vector<std::string> const& args, std::ostream& out, std::ostream& err);

}  // namespace varve::tool
