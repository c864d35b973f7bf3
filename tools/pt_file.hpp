#pragma once

#include <memory>

#include "varve/concepts/format.hpp"

#include "atomic_file.hpp"
#include "checkpoint_file.hpp"

namespace varve::tool {

/// The torch archive's side of checkpoint files, which needs LibTorch; without it each throws errc::unsupported.
std::unique_ptr<file_format> archive_format();
std::unique_ptr<checkpoint_file> open_archive(file_descriptor fd);
/// Writes tensors of `from`, those that `s` names, as `{"model": ..., "optimizer": ..., ...}` for torch.load.
void write_archive(state s, checkpoint_file const& from, checkpoint_identity const& identity, atomic_file& to);

}  // namespace varve::tool
