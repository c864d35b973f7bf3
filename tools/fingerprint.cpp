#include "trainer.hpp"

#include <optional>

#include "varve/detail/digest.hpp"
#include "varve/detail/gather.hpp"

#include "build_config.hpp"
#if VARVE_TOOL_WITH_CUDA
#include "varve/cuda/transfer.hpp"
#endif

namespace varve::tool {

std::vector<std::pair<std::string, std::string>> fingerprint(varve::state& s) {
    std::vector<std::pair<std::string, std::string>> out;
#if VARVE_TOOL_WITH_CUDA
    std::optional<cuda::transfer> device;  // LibTorch's work is in the default stream
#endif
    for (std::size_t i = 0; i < s.layers.size(); ++i) {
        if (s.refresh) s.refresh(i);
        for (auto const& t : s.layers[i].tensors) {
            detail::running_digest digest;
#if VARVE_TOOL_WITH_CUDA
            if (t.memory == memory_kind::device) {
                if (!device) device.emplace(nullptr);
                auto const reader = device->read({&t});
                for (auto bytes = reader->next(); !bytes.empty(); bytes = reader->next()) digest.add(bytes);
                out.emplace_back(t.name, detail::hex(digest.value()));
                continue;
            }
#endif
            detail::for_each_run(t, 0, t.size_bytes(), [&](std::byte const* data, std::size_t, std::size_t size) { digest.add({data, size}); });
            out.emplace_back(t.name, detail::hex(digest.value()));
        }
    }
    return out;
}

}  // namespace varve::tool
