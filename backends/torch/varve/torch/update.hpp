#pragma once

#include <string>

namespace varve::libtorch {

/// Which of LibTorch's kernels carry out the update of Adam and AdamW. They compute the same formula and round differently:
/// bits are comparable between runs of one kind alone. SGD is always updated by `plain`.
enum class update_kind {
    plain,    ///< `optimizer.step()`: a kernel for each operation and tensor
    foreach,  ///< a kernel for each operation, for many tensors at once
    fused,    ///< one kernel for the whole update of many tensors
};

/// Why the LibTorch that this was built with cannot update so; empty if it can: foreach from 2.1 on, fused from 2.1 on a
/// GPU and from 2.4 on a CPU.
std::string missing_update(update_kind kind, bool on_gpu);

}  // namespace varve::libtorch
