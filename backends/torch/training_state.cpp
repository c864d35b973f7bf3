#include "varve/torch/training_state.hpp"

#include <ATen/ATen.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>

#include "layerwise_lists.hpp"
#include "optimizer_state.hpp"
#include "random_state.hpp"
#include "tensor_description.hpp"

namespace varve::libtorch {

using detail::described, detail::watched_tensor;

namespace {

varve::tensor scalar(std::string name, varve::dtype type, void* data) { return {std::move(name), type, {}, data, {}}; }

}  // namespace

struct training_state::parts {
    /// A tensor that is saved from where it is.
    struct fixed {
        ::at::Tensor tensor;
        watched_tensor watched;
    };
    /// One that is saved from a copy.
    struct mirrored {
        ::at::Tensor live, copy;
        watched_tensor watched;
    };
    struct optimized {
        ::at::Tensor parameter;  // keeps the key's address taken
        detail::optimizer_state_key key;
        std::size_t layer, group;
        detail::parameter_state state;
        std::int64_t* step = nullptr;
        std::uint8_t* set = nullptr;
        bool used = false;                  ///< whether the optimizer uses the state's tensors
        std::size_t first_watched = 0;      ///< in watched_of_optimizer, of as many as the state has tensors
        std::array<void const*, 2> seen{};  ///< where the optimizer had them when it was last asked; only to be fetched ahead
    };
    template <class T>
    struct bound {
        T* live;
        T* copy;
    };
    struct option {
        detail::group_option access;
        double* copy;
    };
    /// Where a parameter or buffer went.
    struct place {
        std::string name;
        std::size_t layer;
        bool parameter;
    };

    parts(::torch::optim::Optimizer& o, training_state_options given) : optimizer(o), options(given), access(detail::optimizer_access::of(o)) {}

    ::torch::optim::Optimizer& optimizer;
    training_state_options const options;
    std::unique_ptr<detail::optimizer_access> access;
    detail::python_layout python;

    std::vector<fixed> parameters;
    std::vector<mirrored> mirrors;
    std::vector<optimized> of_optimizer;
    std::vector<watched_tensor> watched_of_optimizer;                                                 ///< one after the other's
    std::vector<std::vector<std::size_t>> parameters_of_layer, mirrors_of_layer, optimized_of_layer;  ///< indices in those above
    std::vector<option> group_options;
    std::vector<bound<std::int64_t>> user_integers;
    std::vector<bound<double>> user_reals;
    std::optional<detail::random_state> generators;
    std::vector<std::size_t> group_sizes;

    // Mirrors of what is no tensor; a deque's elements stay where they are.
    std::deque<std::int64_t> integers;
    std::deque<double> reals;
    std::deque<std::uint8_t> flags;

    std::unordered_map<void const*, place> places;
    std::vector<std::pair<std::string, ::at::Tensor>> ownerless;

    void walk(::torch::nn::Module& module, std::string const& path, varve::state& s);
    void add_optimizer(varve::state& s);
    void add_run(varve::state& s);
    void mirror(std::string name, ::at::Tensor const& live, std::size_t layer, varve::state& s);
    std::unique_ptr<layerwise_updater::lists> lists(varve::state const& s) const;

    std::span<watched_tensor const> watched_of(optimized const& o) const {
        return std::span(watched_of_optimizer).subspan(o.first_watched, o.state.tensors.size());
    }
    void fetch(std::size_t layer) const;
    std::error_code recheck(std::size_t layer, std::size_t run);
    std::error_code recheck_module(std::size_t layer) const;
    void refresh(std::size_t layer, std::size_t run);
    void restored();
};

void training_state::parts::mirror(std::string name, ::at::Tensor const& live, std::size_t layer, varve::state& s) {
    auto as = described(name, live);
    auto copy = live.detach().clone(::at::MemoryFormat::Contiguous);
    s.layers[layer].tensors.push_back(described(std::move(name), copy));
    mirrors_of_layer.resize(s.layers.size());
    mirrors_of_layer[layer].push_back(mirrors.size());
    mirrors.push_back({live, std::move(copy), {live, std::move(as)}});
}

/// One layer for a module that owns parameters; then its children.
void training_state::parts::walk(::torch::nn::Module& module, std::string const& path, varve::state& s) {
    auto full = [&](std::string const& name) { return path.empty() ? name : path + "." + name; };
    auto known = [&](::at::Tensor const& t, std::string const& name) {
        auto it = places.find(t.unsafeGetTensorImpl());
        if (it == places.end()) return false;
        if (it->second.name != name && s.aliases.emplace(name, it->second.name).second) python.model.emplace_back(name.substr(6), it->second.name);
        return true;
    };
    auto const index = s.layers.size();
    bool owns = false;
    for (auto const& item : module.named_parameters(false)) {
        auto name = "model." + full(item.key());
        if (known(item.value(), name)) continue;
        if (!std::exchange(owns, true)) s.layers.push_back({path.empty() ? "model" : "model." + path, {}});
        auto as = described(name, item.value());
        s.layers[index].tensors.push_back(as);
        parameters_of_layer.resize(s.layers.size());
        parameters_of_layer[index].push_back(parameters.size());
        parameters.push_back({item.value(), {item.value(), std::move(as)}});
        python.model.emplace_back(full(item.key()), name);
        places.emplace(item.value().unsafeGetTensorImpl(), place{std::move(name), index, true});
    }
    for (auto const& item : module.named_buffers(false)) {
        auto name = "model." + full(item.key());
        if (known(item.value(), name)) continue;
        if (owns)
            mirror(name, item.value(), index, s);
        else
            ownerless.emplace_back(name, item.value());
        python.model.emplace_back(full(item.key()), name);
        places.emplace(item.value().unsafeGetTensorImpl(), place{std::move(name), index, false});
    }
    for (auto const& child : module.named_children()) walk(*child.value(), full(child.key()), s);
}

void training_state::parts::add_optimizer(varve::state& s) {
    auto& groups = optimizer.param_groups();
    std::unordered_map<void const*, std::size_t> indices;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        group_sizes.push_back(groups[g].params().size());
        python.groups.push_back({access->python_options(), {}});
        for (auto const& parameter : groups[g].params()) {
            auto it = places.find(parameter.unsafeGetTensorImpl());
            if (it == places.end() || !it->second.parameter)
                throw error(errc::unsupported, "a parameter of the optimizer's group " + std::to_string(g) + " is not a parameter of the module");
            if (!indices.emplace(parameter.unsafeGetTensorImpl(), python.parameters.size()).second) continue;
            python.groups[g].parameters.push_back(python.parameters.size());
            auto const layer = it->second.layer;
            auto const name = it->second.name.substr(6);
            python.parameters.push_back(name);

            optimized o{
                .parameter = parameter, .key = detail::state_key(parameter), .layer = layer, .group = g, .state = access->adopt(parameter, g)};
            auto& tensors = s.layers[layer].tensors;
            o.first_watched = watched_of_optimizer.size();
            for (auto const& t : o.state.tensors) {
                tensors.push_back(described("optimizer." + name + "." + t.name, t.tensor));
                watched_of_optimizer.emplace_back(t.tensor, tensors.back());
            }
            if (o.state.counts_steps) {
                o.step = &integers.emplace_back(access->step(o.key));
                tensors.push_back(scalar("optimizer." + name + ".step", dtype::I64, o.step));
            }
            o.used = !access->now(o.key, o.state).tensors.empty();
            if (o.state.may_be_unset) {
                o.set = &flags.emplace_back(o.used ? 1 : 0);
                tensors.push_back(scalar("optimizer." + name + "." + o.state.tensors[0].name + ".set", dtype::BOOL, o.set));
            }
            optimized_of_layer.resize(s.layers.size());
            optimized_of_layer[layer].push_back(of_optimizer.size());
            of_optimizer.push_back(std::move(o));
        }
    }
}

void training_state::parts::add_run(varve::state& s) {
    s.layers.push_back({"run", {}});
    auto const run = s.layers.size() - 1;
    if (options.rng) {
        std::set<::c10::DeviceIndex> gpus;
        for (auto const& p : parameters)
            if (p.tensor.is_cuda()) gpus.insert(p.tensor.device().index());
        generators.emplace(gpus, s.layers[run]);
    }
    for (std::size_t g = 0; g < group_sizes.size(); ++g)
        for (auto& o : access->options(g)) {
            auto* copy = &reals.emplace_back(o.get());
            s.layers[run].tensors.push_back(scalar("optimizer.group." + std::to_string(g) + "." + o.name, dtype::F64, copy));
            group_options.push_back({std::move(o), copy});
        }
    for (auto& [name, buffer] : std::exchange(ownerless, {})) mirror(std::move(name), buffer, run, s);
    for (auto* of_layer : {&parameters_of_layer, &mirrors_of_layer, &optimized_of_layer}) of_layer->resize(s.layers.size());
}

std::unique_ptr<layerwise_updater::lists> training_state::parts::lists(varve::state const& s) const {
    auto out = std::make_unique<layerwise_updater::lists>();
    auto& groups = optimizer.param_groups();
    out->optimizer = &optimizer;
    out->access = access.get();
    // SGD has one operation a tensor: there is nothing to fuse.
    out->kind = access->is_adam() ? options.update : update_kind::plain;
    out->group_sizes = group_sizes;
    out->layers.assign(s.layers.size(), detail::grouped_parameters(groups.size()));
    for (std::size_t g = 0; g < groups.size(); ++g)
        for (auto const& parameter : groups[g].params()) out->layers[places.at(parameter.unsafeGetTensorImpl()).layer][g].push_back(parameter);
    std::vector<std::size_t> bytes;
    for (auto const& l : s.layers) {
        bytes.push_back(0);
        for (auto const& t : l.tensors) bytes.back() += t.size_bytes();
    }
    out->cut(bytes, out->kind == update_kind::plain ? s.layers.size() : std::max<std::size_t>(1, options.update_groups));
    return out;
}

void training_state::parts::fetch(std::size_t layer) const {
    for (auto i : parameters_of_layer[layer]) parameters[i].watched.fetch();
    for (auto i : optimized_of_layer[layer]) {
        auto const& o = of_optimizer[i];
        for (auto const* where : o.seen) __builtin_prefetch(where);
        for (auto const& w : watched_of(o)) w.fetch();
    }
}

/// Of the optimizer's state a restore needs nothing: it gives it what was restored.
std::error_code training_state::parts::recheck_module(std::size_t layer) const {
    for (auto i : parameters_of_layer[layer])
        if (!parameters[i].watched.is_still(parameters[i].tensor)) return errc::state_changed;
    for (auto i : mirrors_of_layer[layer])
        if (!mirrors[i].watched.is_still(mirrors[i].live)) return errc::state_changed;
    return {};
}

std::error_code training_state::parts::recheck(std::size_t layer, std::size_t run) {
    if (layer != run) fetch(layer + 1);
    if (auto ec = recheck_module(layer)) return ec;
    for (auto i : optimized_of_layer[layer]) {
        auto& o = of_optimizer[i];
        if (!access->still_keeps(o.group, o.state)) return errc::state_changed;
        auto const kept = access->now(o.key, o.state);
        auto const& now = kept.tensors;
        if (now.empty() && (o.state.may_be_unset ? !o.used : o.state.tensors.empty())) continue;
        if (now.size() != o.state.tensors.size()) return errc::state_changed;
        if (!o.used) continue;  // the optimizer's own, until refresh
        o.seen = {kept.entry, now.empty() ? nullptr : now.front()};
        for (std::size_t t = 0; t < now.size(); ++t)
            if (!watched_of(o)[t].is_still(*now[t])) return errc::state_changed;
    }
    if (layer != run) return {};
    auto const& groups = optimizer.param_groups();
    bool same = groups.size() == group_sizes.size();
    for (std::size_t g = 0; same && g < groups.size(); ++g) same = groups[g].params().size() == group_sizes[g];
    return same ? std::error_code() : make_error_code(errc::state_changed);
}

void training_state::parts::refresh(std::size_t layer, std::size_t run) {
    ::at::NoGradGuard no_grad;
    for (auto i : mirrors_of_layer[layer]) mirrors[i].copy.copy_(mirrors[i].live);
    for (auto i : optimized_of_layer[layer]) {
        auto& o = of_optimizer[i];
        if (o.step) *o.step = access->step(o.key);
        if (!o.set) continue;
        auto const now = access->now(o.key, o.state).tensors;
        if (!now.empty() && !o.used) {
            o.state.tensors[0].tensor.copy_(*now[0]);
            access->give(o.key, o.state, 0, true);
            o.used = true;
        }
        *o.set = now.empty() ? 0 : 1;
    }
    if (layer != run) return;
    for (auto const& o : group_options) *o.copy = o.access.get();
    for (auto const& u : user_integers) *u.copy = *u.live;
    for (auto const& u : user_reals) *u.copy = *u.live;
    if (generators) generators->refresh();
}

void training_state::parts::restored() {
    ::at::NoGradGuard no_grad;
    if (generators) generators->restore();
    for (auto const& m : mirrors) {
        auto live = m.live.detach();
        live.copy_(m.copy);
    }
    for (auto& o : of_optimizer) {
        if (o.state.tensors.empty()) continue;
        bool const set = !o.set || *o.set != 0;
        access->give(o.key, o.state, o.step ? *o.step : 0, set);
        o.used = set;
    }
    for (auto const& o : group_options) o.access.set(*o.copy);
    for (auto const& u : user_integers) *u.live = *u.copy;
    for (auto const& u : user_reals) *u.live = *u.copy;
}

training_state::training_state(::torch::nn::Module& module, ::torch::optim::Optimizer& optimizer, training_state_options options)
    : parts_(std::make_unique<parts>(optimizer, options)) {
    ::at::NoGradGuard no_grad;
    parts_->walk(module, "", state_);
    bool on_gpu = false;
    for (auto const& p : parts_->parameters) on_gpu = on_gpu || p.tensor.is_cuda();
    if (auto why = missing_update(parts_->access->is_adam() ? options.update : update_kind::plain, on_gpu); !why.empty())
        throw error(errc::unsupported, why);
    parts_->add_optimizer(state_);
    parts_->add_run(state_);
    auto const run = state_.layers.size() - 1;
    updater_ = std::make_unique<layerwise_updater>(parts_->lists(state_));
    state_.recheck = [this, run](std::size_t layer) { return parts_->recheck(layer, run); };
    state_.recheck_to_restore = [this](std::size_t layer) { return parts_->recheck_module(layer); };
    state_.refresh = [this, run](std::size_t layer) { parts_->refresh(layer, run); };
    state_.restored = [this] { parts_->restored(); };
}

training_state::~training_state() = default;

namespace {

std::string user_name(varve::state const& s, std::string const& name) {
    auto full = "user." + name;
    for (auto const& t : s.layers.back().tensors)
        if (t.name == full) throw error(std::make_error_code(std::errc::invalid_argument), full + " was added already");
    return full;
}

}  // namespace

void training_state::add_user(std::string const& name, std::int64_t& value) {
    auto full = user_name(state_, name);
    auto* copy = &parts_->integers.emplace_back(value);
    state_.layers.back().tensors.push_back(scalar(std::move(full), dtype::I64, copy));
    parts_->user_integers.push_back({&value, copy});
}

void training_state::add_user(std::string const& name, double& value) {
    auto full = user_name(state_, name);
    auto* copy = &parts_->reals.emplace_back(value);
    state_.layers.back().tensors.push_back(scalar(std::move(full), dtype::F64, copy));
    parts_->user_reals.push_back({&value, copy});
}

void training_state::add_user(std::string const& name, ::at::Tensor const& value) {
    parts_->mirror(user_name(state_, name), value, state_.layers.size() - 1, state_);
}

detail::python_layout const& training_state::python() const noexcept { return parts_->python; }
::torch::optim::Optimizer& training_state::optimizer() const noexcept { return parts_->optimizer; }

}  // namespace varve::libtorch
