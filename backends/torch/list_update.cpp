#include "list_update.hpp"

#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace varve::libtorch {

std::string missing_update(update_kind kind, bool on_gpu) {
    constexpr int version = TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR;
    if (kind == update_kind::plain) return {};
    bool const fused = kind == update_kind::fused;
    auto const missing = [&](std::string const& first) {
        return "LibTorch " + std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + " has no " +
               (fused ? "fused update" : "foreach update") + (fused && !on_gpu ? " for a CPU" : "") + " (" + first + " has it); take plain";
    };
    if (fused && !on_gpu && version < 204) return missing("2.4");
    if (version < 201) return missing("2.1");
    return {};
}

namespace detail {

namespace {

[[noreturn]] void refuse(char const* why) { throw error(errc::state_changed, why); }

/// The kernels go through memory from its first byte to its last, whatever the strides: tensors must be dense and laid out alike.
bool takes(::at::Tensor const& parameter) {
    auto const type = parameter.scalar_type();
    return (type == ::at::kFloat || type == ::at::kDouble || type == ::at::kHalf || type == ::at::kBFloat16) &&
           parameter.is_non_overlapping_and_dense();
}

bool laid_out_alike(::at::Tensor const& a, ::at::Tensor const& b) {
    return b.scalar_type() == a.scalar_type() && b.device() == a.device() && b.sizes() == a.sizes() && b.strides() == a.strides();
}

// LibTorch 1.13 has some of these kernels, with other arguments and not for what varve needs.
#if TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR >= 201

/// The same operations as torch.optim's, in the same order.
void foreach_adam(adam_lists const& l, std::int64_t step, adam_options const& o) {
    double const correction1 = 1 - std::pow(o.beta1, static_cast<double>(step)), correction2 = 1 - std::pow(o.beta2, static_cast<double>(step));
    std::vector<::at::Tensor> decayed;
    ::at::TensorList gradients = l.gradients;
    if (o.weight_decay != 0 && o.decoupled) {
        ::at::_foreach_mul_(l.parameters, ::at::Scalar(1 - o.lr * o.weight_decay));
    } else if (o.weight_decay != 0) {
        decayed = ::at::_foreach_add(l.gradients, l.parameters, o.weight_decay);
        gradients = decayed;
    }
    ::at::_foreach_lerp_(l.exp_avgs, gradients, ::at::Scalar(1 - o.beta1));
    ::at::_foreach_mul_(l.exp_avg_sqs, ::at::Scalar(o.beta2));
    ::at::_foreach_addcmul_(l.exp_avg_sqs, gradients, gradients, ::at::Scalar(1 - o.beta2));
    if (o.amsgrad) ::at::_foreach_maximum_(l.max_exp_avg_sqs, l.exp_avg_sqs);
    auto denominators = ::at::_foreach_sqrt(o.amsgrad ? l.max_exp_avg_sqs : l.exp_avg_sqs);
    ::at::_foreach_div_(denominators, ::at::Scalar(std::sqrt(correction2)));
    ::at::_foreach_add_(denominators, ::at::Scalar(o.eps));
    ::at::_foreach_addcdiv_(l.parameters, l.exp_avgs, denominators, ::at::Scalar(-o.lr / correction1));
}

void fused_adam(adam_lists const& l, ::at::TensorList steps, adam_options const& o) {
    ::at::TensorList const largest = o.amsgrad ? ::at::TensorList(l.max_exp_avg_sqs) : ::at::TensorList();
    auto const update = [&](auto kernel) {
        kernel(l.parameters, l.gradients, l.exp_avgs, l.exp_avg_sqs, largest, steps, o.lr, o.beta1, o.beta2, o.weight_decay, o.eps, o.amsgrad, false);
    };
    if (o.decoupled)
        update([](auto const&... a) { ::at::_fused_adamw_(a...); });
    else
        update([](auto const&... a) { ::at::_fused_adam_(a...); });
}

#else

[[noreturn]] void foreach_adam(adam_lists const&, std::int64_t, adam_options const&) {
    throw error(errc::unsupported, missing_update(update_kind::foreach, false));
}
[[noreturn]] void fused_adam(adam_lists const&, ::at::TensorList, adam_options const&) {
    throw error(errc::unsupported, missing_update(update_kind::fused, false));
}

#endif

/// Gradients are not kept alive from one step to the next.
class let_go {
public:
    explicit let_go(std::vector<::at::Tensor>& tensors) noexcept : tensors_(tensors) {}
    ~let_go() { tensors_.clear(); }
    let_go(let_go const&) = delete;
    let_go& operator=(let_go const&) = delete;

private:
    std::vector<::at::Tensor>& tensors_;
};

}  // namespace

list_update::list_update(optimizer_access& access, update_kind kind, grouped_parameters const& parameters)
    : access_(access), kind_(kind), rest_(parameters.size()) {
    for (std::size_t g = 0; g < parameters.size(); ++g) {
        std::map<void const*, std::size_t> seen;
        for (auto const& p : parameters[g]) {
            auto const entry = access_.adam_entry_of(state_key(p));
            if (!entry.step) refuse("the optimizer has lost the state of a parameter since the training state was made");
            if (takes(p) && laid_out_alike(p, *entry.exp_avg) && laid_out_alike(p, *entry.exp_avg_sq)) {
                add(p, entry, g, seen[p.unsafeGetTensorImpl()]++);
            } else {
                rest_[g].push_back(p);
                has_rest_ = true;
            }
        }
    }
}

void list_update::add(::at::Tensor const& parameter, adam_entry const& entry, std::size_t group, std::size_t pass) {
    bool const has_largest = entry.max_exp_avg_sq->defined();
    auto const fits = [&](bucket const& b) {
        auto const& first = b.lists.parameters.front();
        return b.group == group && b.pass == pass && first.scalar_type() == parameter.scalar_type() && first.device() == parameter.device() &&
               b.lists.max_exp_avg_sqs.empty() == !has_largest;
    };
    auto at = std::find_if(buckets_.begin(), buckets_.end(), fits);
    if (at == buckets_.end()) {
        at = buckets_.insert(buckets_.end(), bucket{.group = group, .pass = pass});
        if (kind_ == update_kind::fused) at->step = ::at::zeros({}, parameter.options().dtype(::at::kFloat).requires_grad(false));
    }
    at->lists.parameters.push_back(parameter);
    at->lists.exp_avgs.push_back(*entry.exp_avg);
    at->lists.exp_avg_sqs.push_back(*entry.exp_avg_sq);
    if (has_largest) at->lists.max_exp_avg_sqs.push_back(*entry.max_exp_avg_sq);
    at->keys.push_back(state_key(parameter));
    at->counts.push_back(nullptr);
    if (kind_ == update_kind::fused) at->steps.push_back(at->step);
}

void list_update::run() {
    ::at::NoGradGuard no_grad;
    for (auto& b : buckets_) run(b);
}

void list_update::run(bucket& b) {
    auto& l = b.lists;
    let_go gradients(l.gradients);
    auto const options = access_.adam_options_of(b.group);
    if (options.amsgrad && l.max_exp_avg_sqs.empty()) refuse("amsgrad was switched on since the training state was made");
    bool together = true;
    for (std::size_t i = 0; i < l.parameters.size(); ++i) {
        auto const& p = l.parameters[i];
        auto const& gradient = p.grad();
        l.gradients.push_back(gradient);
        b.counts[i] = nullptr;
        if (!gradient.defined()) {
            together = false;
            continue;
        }
        TORCH_CHECK(!gradient.is_sparse(), "Adam does not support sparse gradients");
        if (!laid_out_alike(p, gradient)) l.gradients[i] = ::at::empty_like(p).copy_(gradient);
        auto const entry = access_.adam_entry_of(b.keys[i]);
        if (!entry.step || !entry.exp_avg->is_same(l.exp_avgs[i]) || !entry.exp_avg_sq->is_same(l.exp_avg_sqs[i]) ||
            (!l.max_exp_avg_sqs.empty() && !entry.max_exp_avg_sq->is_same(l.max_exp_avg_sqs[i])))
            refuse("the optimizer has got other state since the training state was made");
        b.counts[i] = entry.step;
        together = together && *entry.step == *b.counts[0];
    }
    if (together) {
        call(b, l, *b.counts[0] + 1, options);
    } else {
        // One step's correction is one number: what has been updated less often goes by itself.
        std::map<std::int64_t, adam_lists> by_count;
        for (std::size_t i = 0; i < l.parameters.size(); ++i) {
            if (!b.counts[i]) continue;
            auto& of = by_count[*b.counts[i]];
            of.parameters.push_back(l.parameters[i]);
            of.gradients.push_back(l.gradients[i]);
            of.exp_avgs.push_back(l.exp_avgs[i]);
            of.exp_avg_sqs.push_back(l.exp_avg_sqs[i]);
            if (!l.max_exp_avg_sqs.empty()) of.max_exp_avg_sqs.push_back(l.max_exp_avg_sqs[i]);
        }
        for (auto const& [count, some] : by_count) call(b, some, count + 1, options);
    }
    for (auto* count : b.counts)
        if (count) ++*count;
}

void list_update::call(bucket& b, adam_lists const& lists, std::int64_t step, adam_options const& options) {
    if (kind_ == update_kind::foreach) {
        foreach_adam(lists, step, options);
        return;
    }
    // A kernel's argument: no copy from the host. Filled each time, it is right after a restore, too.
    b.step.fill_(static_cast<double>(step));
    fused_adam(lists, ::at::TensorList(b.steps.data(), lists.parameters.size()), options);
}

}  // namespace detail

}  // namespace varve::libtorch
