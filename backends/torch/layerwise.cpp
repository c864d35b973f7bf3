#include "layerwise_lists.hpp"

namespace varve::libtorch {

namespace {

/// Puts a layer's lists into the groups, and the groups' own back.
class narrowed {
public:
    narrowed(layerwise_updater::lists& l, layerwise_updater::lists::layer& of) noexcept : lists_(l), layer_(of) { swap(); }
    ~narrowed() { swap(); }
    narrowed(narrowed const&) = delete;
    narrowed& operator=(narrowed const&) = delete;

private:
    void swap() noexcept {
        auto& groups = lists_.optimizer->param_groups();
        for (std::size_t g = 0; g < layer_.of_group.size(); ++g) groups[g].params().swap(layer_.of_group[g]);
    }

    layerwise_updater::lists& lists_;
    layerwise_updater::lists::layer& layer_;
};

}  // namespace

layerwise_updater::layerwise_updater(std::unique_ptr<lists> l) noexcept : lists_(std::move(l)) {}
layerwise_updater::~layerwise_updater() = default;

void layerwise_updater::update(std::size_t index) {
    auto& of = lists_->layers.at(index);
    if (of.empty) return;
    if (!lists_->fits_optimizer()) throw error(errc::state_changed, "the optimizer has got other parameters since the training state was made");
    narrowed guard(*lists_, of);
    lists_->optimizer->step();
}

}  // namespace varve::libtorch
