#pragma once

#include <cstddef>
#include <cstdint>

#include "device_model.hpp"

namespace varve_test {

template <class Scheduling>
using checkpointer = varve::checkpointer<varve::cuda::pinned_staging, Scheduling, checking_sink>;

template <class Checkpointer>
varve::ticket train_step(Checkpointer& ck, device_model& model, std::uint64_t step, cudaStream_t stream) {
    ck.begin(step);
    for (std::size_t l = 0; l < model.layers(); ++l) {
        ck.before_update(l, {stream});
        model.update(l, step, stream);
        ck.layer_ready(l, {stream});
    }
    return ck.seal({}, {stream});
}

}  // namespace varve_test
