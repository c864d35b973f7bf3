#include "trainer.hpp"

#include "varve/detail/digest.hpp"
#include "varve/detail/gather.hpp"

namespace varve::tool {

std::vector<std::pair<std::string, std::string>> fingerprint(varve::state& s) {
    std::vector<std::pair<std::string, std::string>> out;
    for (std::size_t i = 0; i < s.layers.size(); ++i) {
        if (s.refresh) s.refresh(i);
        for (auto const& t : s.layers[i].tensors) {
            detail::running_digest digest;
            detail::for_each_run(t, 0, t.size_bytes(), [&](std::byte const* data, std::size_t, std::size_t size) { digest.add({data, size}); });
            out.emplace_back(t.name, detail::hex(digest.value()));
        }
    }
    return out;
}

}  // namespace varve::tool
