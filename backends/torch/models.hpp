#pragma once

#include <torch/torch.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/detail/gather.hpp"
#include "varve/state.hpp"

/// What the tests of this backend train: small, but with every kind of state that a module may have.
namespace varve_test {

/// Asks about every layer, as a save does.
inline std::error_code recheck(varve::state const& s) {
    for (std::size_t l = 0; l < s.layers.size(); ++l)
        if (auto ec = s.recheck(l)) return ec;
    return {};
}

/// A transformer, with dropout (so that the generator's state matters).
struct small_transformer : torch::nn::Module {
    small_transformer() {
        embedding = register_module("embedding", torch::nn::Embedding(50, 32));
        torch::nn::TransformerEncoderLayer layer(torch::nn::TransformerEncoderLayerOptions(32, 4).dim_feedforward(48).dropout(0.1));
        encoder = register_module("encoder", torch::nn::TransformerEncoder(layer, 2));
        head = register_module("head", torch::nn::Linear(32, 50));
    }
    torch::Tensor loss(std::int64_t step) {
        auto tokens = (torch::arange(8 * 6, torch::TensorOptions(torch::kLong).device(embedding->weight.device())).view({8, 6}) * 7 + step * 13) % 50;
        auto logits = head(encoder(embedding(tokens).transpose(0, 1)));
        return torch::nn::functional::cross_entropy(logits.reshape({-1, 50}), tokens.transpose(0, 1).reshape(-1));
    }
    torch::nn::Embedding embedding{nullptr};
    torch::nn::TransformerEncoder encoder{nullptr};
    torch::nn::Linear head{nullptr};
};

/// Buffers (owned and ownerless), tied parameters, one without a gradient, one frozen, one with strides of its own.
struct odd_model : torch::nn::Module {
    struct shift : torch::nn::Module {
        shift() { offset = register_buffer("offset", torch::zeros({3})); }
        torch::Tensor offset;
    };
    struct tied_head : torch::nn::Module {
        explicit tied_head(torch::Tensor const& shared) {
            weight = register_parameter("weight", shared);
            bias = register_parameter("bias", torch::zeros({20}));
        }
        torch::Tensor weight, bias;
    };
    odd_model() {
        embedding = register_module("embedding", torch::nn::Embedding(20, 12));
        linear = register_module("linear", torch::nn::Linear(12, 12));
        norm = register_module("norm", torch::nn::BatchNorm1d(12));
        shifts = register_module("shifts", std::make_shared<shift>());
        tied = register_module("tied", std::make_shared<tied_head>(embedding->weight));
        strided = register_parameter("strided", torch::randn({12, 5}).t());
        unused = register_parameter("unused", torch::randn({4}));
        frozen = register_parameter("frozen", torch::randn({12}), false);
    }
    torch::Tensor loss(std::int64_t step) {
        auto tokens = (torch::arange(16) * 3 + step) % 20;
        auto x = norm(linear(embedding(tokens)) + frozen);
        shifts->offset.add_(1);
        auto mixed = x + torch::matmul(torch::matmul(x, strided.t()), strided);
        auto logits = torch::matmul(mixed, tied->weight.t()) + tied->bias;
        return torch::nn::functional::cross_entropy(logits, (tokens + 1) % 20);
    }
    torch::nn::Embedding embedding{nullptr};
    torch::nn::Linear linear{nullptr};
    torch::nn::BatchNorm1d norm{nullptr};
    std::shared_ptr<shift> shifts;
    std::shared_ptr<tied_head> tied;
    torch::Tensor strided, unused, frozen;
};

using make_optimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<torch::Tensor>)>;

struct named_optimizer {
    std::string name;
    make_optimizer make;
};

template <class Optimizer, class Options>
make_optimizer with(Options options) {
    return [options](std::vector<torch::Tensor> parameters) -> std::unique_ptr<torch::optim::Optimizer> {
        return std::make_unique<Optimizer>(std::move(parameters), options);
    };
}

inline std::vector<named_optimizer> optimizers() {
    using namespace torch::optim;
    return {
        {"adam", with<Adam>(AdamOptions(1e-2))},
        {"adam amsgrad decay", with<Adam>(AdamOptions(1e-2).amsgrad(true).weight_decay(0.1))},
        {"adamw", with<AdamW>(AdamWOptions(1e-2))},
        {"adamw amsgrad", with<AdamW>(AdamWOptions(1e-2).amsgrad(true))},
        {"sgd", with<SGD>(SGDOptions(1e-1))},
        {"sgd momentum", with<SGD>(SGDOptions(1e-1).momentum(0.9))},
        {"sgd dampening", with<SGD>(SGDOptions(1e-1).momentum(0.9).dampening(0.3).weight_decay(0.01))},
        {"sgd nesterov", with<SGD>(SGDOptions(1e-1).momentum(0.9).nesterov(true))},
    };
}

/// The parameters each once: LibTorch lists tied ones as often as they are registered.
inline std::vector<torch::Tensor> unique_parameters(torch::nn::Module const& m) {
    std::vector<torch::Tensor> out;
    for (auto const& p : m.parameters())
        if (std::none_of(out.begin(), out.end(), [&](auto const& o) { return o.unsafeGetTensorImpl() == p.unsafeGetTensorImpl(); })) out.push_back(p);
    return out;
}

/// Every tensor's row-major bytes, by name.
inline std::vector<std::pair<std::string, std::vector<std::byte>>> contents(varve::state& s) {
    std::vector<std::pair<std::string, std::vector<std::byte>>> out;
    for (std::size_t l = 0; l < s.layers.size(); ++l) {
        s.refresh(l);
        for (auto const& t : s.layers[l].tensors) {
            std::vector<std::byte> bytes(t.size_bytes());
            varve::detail::gather(t, 0, bytes.size(), bytes.data());
            out.emplace_back(t.name, std::move(bytes));
        }
    }
    return out;
}

/// What a format's restore does.
inline void put_back(varve::state& s, std::vector<std::pair<std::string, std::vector<std::byte>>> const& from) {
    std::size_t i = 0;
    for (auto const& l : s.layers)
        for (auto const& t : l.tensors) {
            auto const& [name, bytes] = from.at(i++);
            if (name != t.name || bytes.size() != t.size_bytes()) throw std::logic_error("not the same layout: " + name + ", " + t.name);
            varve::detail::scatter(t, 0, bytes.size(), bytes.data());
        }
    s.restored();
}

/// Loss and update of one step, the update as `how` does it.
template <class Model, class Update>
float train_step(Model& m, torch::optim::Optimizer& o, std::int64_t step, Update how) {
    auto loss = m.loss(step);
    o.zero_grad();
    loss.backward();
    how();
    return loss.template item<float>();
}

template <class Model>
float train_step(Model& m, torch::optim::Optimizer& o, std::int64_t step) {
    return train_step(m, o, step, [&] { o.step(); });
}

}  // namespace varve_test
