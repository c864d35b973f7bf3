#include "layerwise_lists.hpp"

#include <utility>

namespace varve::libtorch {

namespace {

/// Puts some parameters into the groups, and the groups' own back.
class narrowed {
public:
    narrowed(::torch::optim::Optimizer& optimizer, detail::grouped_parameters& to) noexcept : optimizer_(optimizer), parameters_(to) { swap(); }
    ~narrowed() { swap(); }
    narrowed(narrowed const&) = delete;
    narrowed& operator=(narrowed const&) = delete;

private:
    void swap() noexcept {
        auto& groups = optimizer_.param_groups();
        for (std::size_t g = 0; g < parameters_.size(); ++g) groups[g].params().swap(parameters_[g]);
    }

    ::torch::optim::Optimizer& optimizer_;
    detail::grouped_parameters& parameters_;
};

bool has_any(detail::grouped_parameters const& parameters) {
    for (auto const& of_group : parameters)
        if (!of_group.empty()) return true;
    return false;
}

}  // namespace

void layerwise_updater::lists::cut(std::vector<std::size_t> const& bytes, std::size_t into) {
    auto const count = bytes.size() - 1;
    std::size_t total = 0;
    for (std::size_t l = 0; l < count; ++l) total += bytes[l];
    std::size_t in_last = 0;
    for (std::size_t l = 0; l < count; ++l) {
        // A layer that would make a range too large begins one: the last range never has to wait for most of the state.
        if (groups.empty() || into >= count || in_last + bytes[l] > total / into) {
            groups.push_back({l, l});
            in_last = 0;
        }
        groups.back().last = l + 1;
        in_last += bytes[l];
    }
}

layerwise_updater::layerwise_updater(std::unique_ptr<lists> l) noexcept : lists_(std::move(l)) {}
layerwise_updater::~layerwise_updater() = default;

update_kind layerwise_updater::kind() const noexcept { return lists_->kind; }
std::vector<layer_range> const& layerwise_updater::groups() const noexcept { return lists_->groups; }

void layerwise_updater::update(std::size_t index) { update({index, index + 1}); }

void layerwise_updater::update(layer_range range) {
    auto& of = *lists_;
    auto const expect_same = [&] {
        if (!of.fits_optimizer()) throw error(errc::state_changed, "the optimizer has got other parameters since the training state was made");
    };
    if (of.kind == update_kind::plain) {
        for (auto l = range.first; l < range.last; ++l) {
            auto& layer = of.layers.at(l);
            if (!has_any(layer)) continue;
            expect_same();
            narrowed guard(*of.optimizer, layer);
            of.optimizer->step();
        }
        return;
    }
    expect_same();
    auto known = of.of_range.find({range.first, range.last});
    if (known == of.of_range.end()) {
        detail::grouped_parameters together(of.group_sizes.size());
        for (auto l = range.first; l < range.last; ++l)
            for (std::size_t g = 0; g < together.size(); ++g)
                together[g].insert(together[g].end(), of.layers.at(l)[g].begin(), of.layers.at(l)[g].end());
        known = of.of_range.try_emplace({range.first, range.last}, *of.access, of.kind, together).first;
    }
    known->second.run();
    if (!known->second.has_rest()) return;
    narrowed guard(*of.optimizer, known->second.rest());
    of.optimizer->step();
}

void layerwise_updater::update_all() {
    if (lists_->kind == update_kind::plain)
        lists_->optimizer->step();
    else
        update({0, lists_->layers.size()});
}

}  // namespace varve::libtorch
