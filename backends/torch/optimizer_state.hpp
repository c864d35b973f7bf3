#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/optimizer.h>
#include <torch/optim/sgd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "varve/error.hpp"
#include "varve/torch/detail/python_layout.hpp"

namespace varve::libtorch::detail {

using optimizer_state_map = std::remove_cvref_t<decltype(std::declval<::torch::optim::Optimizer&>().state())>;
/// A string that shows an address in LibTorch 1.13, an address later.
using optimizer_state_key = optimizer_state_map::key_type;

template <class Key = optimizer_state_key>
Key state_key(::at::Tensor const& parameter) {
    void* address = parameter.unsafeGetTensorImpl();
    if constexpr (std::is_same_v<Key, std::string>) {
        std::ostringstream text;
        text << address;
        return text.str();
    } else {
        return address;
    }
}

/// One option of one group.
struct group_option {
    std::string name;
    std::function<double()> get;
    std::function<void(double)> set;
};

/// What one parameter's update keeps: a count, and tensors that LibTorch would create at the first update.
struct parameter_state {
    struct named_tensor {
        char const* name;
        ::at::Tensor tensor;
    };
    bool counts_steps = false;
    bool may_be_unset = false;  ///< the first update makes the tensor, and does something else than with a zero
    std::vector<named_tensor> tensors;
};

/// Adam's options of a group, and what it has of a parameter: null where nothing.
struct adam_options {
    double lr, beta1, beta2, eps, weight_decay;
    bool amsgrad, decoupled;
};
struct adam_entry {
    ::at::Tensor const *exp_avg = nullptr, *exp_avg_sq = nullptr, *max_exp_avg_sq = nullptr;
    std::int64_t* step = nullptr;
};

/// What one parameter has, without an allocation or a count of references: every save asks for it. Valid until the optimizer
/// changes it.
struct kept_tensors {
    ::c10::SmallVector<::at::Tensor const*, 3> tensors;
    void const* entry = nullptr;  ///< the state map's
};

/// The optimizers whose state can be saved, behind one interface; every function but the first takes the state map's entry
/// for what it is.
class optimizer_access {
public:
    virtual ~optimizer_access() = default;

    /// Throws errc::unsupported for an optimizer that is none of them.
    static std::unique_ptr<optimizer_access> of(::torch::optim::Optimizer& optimizer);

    virtual std::vector<group_option> options(std::size_t group) = 0;
    virtual std::vector<python_option> python_options() const = 0;
    /// The state of a parameter of that group: the optimizer's own where there is one, else fresh tensors, which the
    /// optimizer gets at once unless they may be unset.
    virtual parameter_state adopt(::at::Tensor const& parameter, std::size_t group) = 0;
    /// Whether the optimizer would keep the state that adopt() found, under the options of now.
    virtual bool still_keeps(std::size_t group, parameter_state const& s) const = 0;

    /// What the optimizer has for the parameter, in the order of `s`; no tensors where it has nothing.
    virtual kept_tensors now(optimizer_state_key const& key, parameter_state const& s) const = 0;
    virtual std::int64_t step(optimizer_state_key const& key) const = 0;
    /// Makes the optimizer keep `s` with that count; drops what it has where `set` is false.
    virtual void give(optimizer_state_key const& key, parameter_state const& s, std::int64_t step, bool set) = 0;

    virtual bool is_adam() const noexcept { return false; }
    virtual adam_options adam_options_of(std::size_t) const { return {}; }
    virtual adam_entry adam_entry_of(optimizer_state_key const&) const { return {}; }
};

/// Adam and AdamW, which differ in the types' names alone.
template <class Options, class State>
class adam_access final : public optimizer_access {
public:
    adam_access(::torch::optim::Optimizer& optimizer, bool decoupled) : optimizer_(optimizer), decoupled_(decoupled) {}

    std::vector<group_option> options(std::size_t group) override {
        auto of = [this, group]() -> Options& { return options_of(group); };
        return {
            {"lr", [of] { return of().lr(); }, [of](double v) { of().lr(v); }},
            {"betas.0", [of] { return std::get<0>(of().betas()); }, [of](double v) { of().betas({v, std::get<1>(of().betas())}); }},
            {"betas.1", [of] { return std::get<1>(of().betas()); }, [of](double v) { of().betas({std::get<0>(of().betas()), v}); }},
            {"eps", [of] { return of().eps(); }, [of](double v) { of().eps(v); }},
            {"weight_decay", [of] { return of().weight_decay(); }, [of](double v) { of().weight_decay(v); }},
            {"amsgrad", [of] { return of().amsgrad() ? 1.0 : 0.0; }, [of](double v) { of().amsgrad(v != 0); }},
        };
    }

    std::vector<python_option> python_options() const override { return python_adam_options(decoupled_); }

    parameter_state adopt(::at::Tensor const& parameter, std::size_t group) override {
        auto& entry = optimizer_.state()[state_key(parameter)];
        if (!entry) {
            auto fresh = std::make_unique<State>();
            fresh->step(0);
            fresh->exp_avg(::at::zeros_like(parameter, {}, ::at::MemoryFormat::Preserve));
            fresh->exp_avg_sq(::at::zeros_like(parameter, {}, ::at::MemoryFormat::Preserve));
            if (options_of(group).amsgrad()) fresh->max_exp_avg_sq(::at::zeros_like(parameter, {}, ::at::MemoryFormat::Preserve));
            entry = std::move(fresh);
        }
        auto& s = static_cast<State&>(*entry);
        parameter_state out{.counts_steps = true, .tensors = {{"exp_avg", s.exp_avg()}, {"exp_avg_sq", s.exp_avg_sq()}}};
        if (s.max_exp_avg_sq().defined()) out.tensors.push_back({"max_exp_avg_sq", s.max_exp_avg_sq()});
        return out;
    }

    bool still_keeps(std::size_t group, parameter_state const& s) const override { return !options_of(group).amsgrad() || s.tensors.size() == 3; }

    kept_tensors now(optimizer_state_key const& key, parameter_state const& s) const override {
        auto it = optimizer_.state().find(key);
        if (it == optimizer_.state().end()) return {};
        auto& of = static_cast<State&>(*it->second);
        kept_tensors out{{&of.exp_avg(), &of.exp_avg_sq()}, &*it};
        if (s.tensors.size() == 3) out.tensors.push_back(&of.max_exp_avg_sq());
        return out;
    }

    std::int64_t step(optimizer_state_key const& key) const override {
        auto it = optimizer_.state().find(key);
        return it == optimizer_.state().end() ? 0 : static_cast<State&>(*it->second).step();
    }

    void give(optimizer_state_key const& key, parameter_state const& s, std::int64_t step, bool) override {
        auto fresh = std::make_unique<State>();
        fresh->step(step);
        fresh->exp_avg(s.tensors[0].tensor);
        fresh->exp_avg_sq(s.tensors[1].tensor);
        if (s.tensors.size() == 3) fresh->max_exp_avg_sq(s.tensors[2].tensor);
        optimizer_.state()[key] = std::move(fresh);
    }

    bool is_adam() const noexcept override { return true; }

    adam_options adam_options_of(std::size_t group) const override {
        auto& o = options_of(group);
        return {o.lr(), std::get<0>(o.betas()), std::get<1>(o.betas()), o.eps(), o.weight_decay(), o.amsgrad(), decoupled_};
    }

    adam_entry adam_entry_of(optimizer_state_key const& key) const override {
        auto it = optimizer_.state().find(key);
        if (it == optimizer_.state().end()) return {};
        auto& of = static_cast<State&>(*it->second);
        return {&of.exp_avg(), &of.exp_avg_sq(), &of.max_exp_avg_sq(), &of.step()};
    }

private:
    Options& options_of(std::size_t group) const { return static_cast<Options&>(optimizer_.param_groups().at(group).options()); }

    ::torch::optim::Optimizer& optimizer_;
    bool decoupled_;
};

class sgd_access final : public optimizer_access {
public:
    explicit sgd_access(::torch::optim::Optimizer& optimizer) : optimizer_(optimizer) {}

    std::vector<group_option> options(std::size_t group) override {
        auto of = [this, group]() -> options_type& { return options_of(group); };
        return {
            {"lr", [of] { return of().lr(); }, [of](double v) { of().lr(v); }},
            {"momentum", [of] { return of().momentum(); }, [of](double v) { of().momentum(v); }},
            {"dampening", [of] { return of().dampening(); }, [of](double v) { of().dampening(v); }},
            {"weight_decay", [of] { return of().weight_decay(); }, [of](double v) { of().weight_decay(v); }},
            {"nesterov", [of] { return of().nesterov() ? 1.0 : 0.0; }, [of](double v) { of().nesterov(v != 0); }},
        };
    }

    std::vector<python_option> python_options() const override { return python_sgd_options(); }

    parameter_state adopt(::at::Tensor const& parameter, std::size_t group) override {
        auto it = optimizer_.state().find(state_key(parameter));
        if (it != optimizer_.state().end())
            return {.may_be_unset = true, .tensors = {{"momentum_buffer", static_cast<state_type&>(*it->second).momentum_buffer()}}};
        if (options_of(group).momentum() == 0) return {};
        return {.may_be_unset = true, .tensors = {{"momentum_buffer", ::at::zeros_like(parameter, {}, ::at::MemoryFormat::Preserve)}}};
    }

    bool still_keeps(std::size_t group, parameter_state const& s) const override { return options_of(group).momentum() == 0 || !s.tensors.empty(); }

    kept_tensors now(optimizer_state_key const& key, parameter_state const&) const override {
        auto it = optimizer_.state().find(key);
        if (it == optimizer_.state().end()) return {};
        return {{&static_cast<state_type&>(*it->second).momentum_buffer()}, &*it};
    }

    std::int64_t step(optimizer_state_key const&) const override { return 0; }

    void give(optimizer_state_key const& key, parameter_state const& s, std::int64_t, bool set) override {
        if (!set) {
            optimizer_.state().erase(key);
            return;
        }
        auto fresh = std::make_unique<state_type>();
        fresh->momentum_buffer(s.tensors[0].tensor);
        optimizer_.state()[key] = std::move(fresh);
    }

private:
    using options_type = ::torch::optim::SGDOptions;
    using state_type = ::torch::optim::SGDParamState;

    options_type& options_of(std::size_t group) const { return static_cast<options_type&>(optimizer_.param_groups().at(group).options()); }

    ::torch::optim::Optimizer& optimizer_;
};

inline std::unique_ptr<optimizer_access> optimizer_access::of(::torch::optim::Optimizer& optimizer) {
    using namespace ::torch::optim;
    if (dynamic_cast<AdamW*>(&optimizer)) return std::make_unique<adam_access<AdamWOptions, AdamWParamState>>(optimizer, true);
    if (dynamic_cast<Adam*>(&optimizer)) return std::make_unique<adam_access<AdamOptions, AdamParamState>>(optimizer, false);
    if (dynamic_cast<SGD*>(&optimizer)) return std::make_unique<sgd_access>(optimizer);
    throw error(errc::unsupported, "the state of this optimizer cannot be saved: only that of Adam, AdamW and SGD");
}

}  // namespace varve::libtorch::detail
