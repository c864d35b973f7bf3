#include "varve/error.hpp"

#include "pt_file.hpp"

namespace varve::tool {

namespace {

[[noreturn]] void missing() {
    throw error(errc::unsupported, "a .pt file needs LibTorch, which this varve was built without; build it with -Dtorch=enabled");
}

}  // namespace

std::unique_ptr<file_format> archive_format() { missing(); }
std::unique_ptr<checkpoint_file> open_archive(file_descriptor) { missing(); }
void write_archive(state, checkpoint_file const&, checkpoint_identity const&, atomic_file&) { missing(); }

}  // namespace varve::tool
