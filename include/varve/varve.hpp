#pragma once

/// All of the core. Backends have headers of their own: varve/posix/sink.hpp, varve/uring/sink.hpp, varve/torch/...

#include "varve/checkpointer.hpp"
#include "varve/concepts/format.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/error.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/image.hpp"
#include "varve/observer.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/scheduling/sync.hpp"
#include "varve/sink/memory.hpp"
#include "varve/sink/null.hpp"
#include "varve/staging/host.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"
#include "varve/ticket.hpp"
#include "varve/version.hpp"
