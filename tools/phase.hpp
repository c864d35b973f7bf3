#pragma once

#include "build_config.hpp"

#if VARVE_TOOL_WITH_CUDA_RUNTIME
#include <nvtx3/nvToolsExt.h>
#endif

namespace varve::tool {

/// Names what the training thread does as long as this lives, in a profile; free where no profiler is attached.
class phase {
public:
#if VARVE_TOOL_WITH_CUDA_RUNTIME
    explicit phase(char const* name) noexcept { ::nvtxRangePushA(name); }
    ~phase() { ::nvtxRangePop(); }
#else
    explicit phase(char const*) noexcept {}
    ~phase() {}
#endif
    phase(phase const&) = delete;
    phase& operator=(phase const&) = delete;
};

}  // namespace varve::tool
