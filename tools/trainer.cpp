#include "trainer.hpp"

#include <torch/torch.h>

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <cstdlib>
#include <numeric>
#include <random>

#include "build_config.hpp"

#if VARVE_TOOL_WITH_CUDA
#include "varve/cuda/event.hpp"
#endif
#include "varve/torch/cuda_stream.hpp"
#include "varve/torch/layerwise.hpp"
#include "varve/torch/training_state.hpp"

#include "errors.hpp"

namespace varve::tool {

namespace {

constexpr std::int64_t max_positions = 512;

#if TORCH_VERSION_MAJOR >= 2

/// What nn::TransformerEncoderLayer computes, with the attention in one kernel where the device has one: [batch, sequence, width].
::torch::Tensor encoded(::torch::nn::TransformerEncoderLayerImpl& layer, ::torch::Tensor const& x) {
    auto& attention = *layer.self_attn;
    auto const batch = x.size(0), length = x.size(1), width = x.size(2), heads = attention.options.num_heads();
    // Views of one product: neither they nor their gradients need more than one copy.
    auto const of = ::torch::linear(x, attention.in_proj_weight, attention.in_proj_bias).view({batch, length, 3, heads, width / heads}).unbind(2);
    auto const dropped = layer.is_training() ? attention.options.dropout() : 0.0;
    auto const mixed = ::at::scaled_dot_product_attention(of[0].transpose(1, 2), of[1].transpose(1, 2), of[2].transpose(1, 2), {}, dropped);
    auto const attended = attention.out_proj(mixed.transpose(1, 2).reshape({batch, length, width}));
    auto const y = layer.norm1(x + layer.dropout1(attended));
    return layer.norm2(y + layer.dropout2(layer.linear2(layer.dropout(::torch::relu(layer.linear1(y))))));
}

#endif

struct transformer : ::torch::nn::Module {
    explicit transformer(settings const& s) {
        auto const d = static_cast<std::int64_t>(s.model.d_model);
        auto const vocabulary = static_cast<std::int64_t>(s.model.vocab_size);
        token_embedding = register_module("token_embedding", ::torch::nn::Embedding(vocabulary, d));
        position_embedding = register_module("position_embedding", ::torch::nn::Embedding(max_positions, d));
        ::torch::nn::TransformerEncoderLayer layer(::torch::nn::TransformerEncoderLayerOptions(d, static_cast<std::int64_t>(s.model.nhead))
                                                       .dim_feedforward(static_cast<std::int64_t>(s.model.dim_feedforward))
                                                       .dropout(s.run.dropout));
        encoder = register_module("encoder", ::torch::nn::TransformerEncoder(layer, static_cast<std::int64_t>(s.model.num_layers)));
        head = register_module("head", ::torch::nn::Linear(d, vocabulary));
    }

    /// Tokens [batch, sequence] to logits [batch, sequence, vocabulary].
    ::torch::Tensor forward(::torch::Tensor const& tokens) {
        auto x = token_embedding(tokens) + position_embedding->weight.narrow(0, 0, tokens.size(1));
#if TORCH_VERSION_MAJOR >= 2
        for (auto const& layer : *encoder->layers) x = encoded(*layer->as<::torch::nn::TransformerEncoderLayer>(), x);
#else
        x = encoder(x.transpose(0, 1)).transpose(0, 1);
#endif
        return head(x);
    }

    ::torch::nn::Embedding token_embedding{nullptr}, position_embedding{nullptr};
    ::torch::nn::TransformerEncoder encoder{nullptr};
    ::torch::nn::Linear head{nullptr};
};

/// The order in which an epoch takes the samples: a Fisher-Yates shuffle of its own, since std::shuffle may differ between
/// standard libraries and LibTorch's generator belongs to dropout.
std::vector<std::int64_t> permutation(std::uint64_t count, std::uint64_t seed, std::uint64_t epoch) {
    std::seed_seq mix{std::uint32_t(seed), std::uint32_t(seed >> 32), std::uint32_t(epoch), std::uint32_t(epoch >> 32)};
    std::mt19937_64 generator(mix);
    std::vector<std::int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    for (auto i = count; i > 1; --i) std::swap(order[i - 1], order[generator() % i]);
    return order;
}

libtorch::update_kind kind_of(std::string const& name) {
    return name == "fused" ? libtorch::update_kind::fused : name == "foreach" ? libtorch::update_kind::foreach : libtorch::update_kind::plain;
}

class torch_trainer final : public trainer {
public:
    explicit torch_trainer(settings const& s) : settings_(s), device_(chosen_device(s) == "cuda" ? ::torch::kCUDA : ::torch::kCPU) {
        if (device_.is_cuda()) {
            // The same bits in every run; cuBLAS reads its variable when the first product is computed.
            ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
            // Not only a warning: memory-efficient attention is deterministic under this setting alone.
            ::at::globalContext().setDeterministicAlgorithms(true, false);
#if TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR >= 202
            // Nothing here reads memory that was not written; filling it all would only cost time.
            ::at::globalContext().setDeterministicFillUninitializedMemory(false);
#endif
        }
        ::torch::manual_seed(s.run.seed);
        auto const samples = static_cast<std::int64_t>(s.training.num_samples), length = static_cast<std::int64_t>(s.training.seq_len);
        // One token more than a sample is long: the target is the sample moved by one.
        auto generator = ::at::detail::createCPUGenerator(s.run.seed);
        data_ = ::torch::randint(0, static_cast<std::int64_t>(s.model.vocab_size), {samples, length + 1}, generator, ::torch::kLong).to(device_);
        model_ = std::make_shared<transformer>(s);
        // Made on the CPU, so that the seed gives the same weights on either.
        model_->to(device_);
        model_->train();
        optimizer_ = std::make_unique<::torch::optim::Adam>(model_->parameters(), ::torch::optim::AdamOptions(s.run.lr));
        state_ =
            std::make_unique<libtorch::training_state>(*model_, *optimizer_, libtorch::training_state_options{.update = kind_of(chosen_update(s))});
#if VARVE_TOOL_WITH_CUDA
        if (device_.is_cuda()) {
            events_ = std::make_shared<cuda::event_pool>(2);
            loss_on_host_ = ::torch::empty({}, ::torch::kFloat).pin_memory();
        }
#endif
        // What no tensor's shape shows but defines the run: a restart compares it, and a reader of the file finds it.
        seed_ = static_cast<std::int64_t>(s.run.seed);
        num_samples_ = samples;
        batch_size_ = static_cast<std::int64_t>(s.training.batch_size);
        seq_len_ = length;
        nhead_ = static_cast<std::int64_t>(s.model.nhead);
        dropout_ = s.run.dropout;
        lr_ = s.run.lr;
        state_->add_user("epoch", epoch_);
        state_->add_user("position", position_);
        state_->add_user("seed", seed_);
        state_->add_user("num_samples", num_samples_);
        state_->add_user("batch_size", batch_size_);
        state_->add_user("seq_len", seq_len_);
        state_->add_user("nhead", nhead_);
        state_->add_user("dropout", dropout_);
        state_->add_user("lr", lr_);
    }

    float forward_backward(std::uint64_t step) override {
        auto const batch = data_.index_select(0, samples_of(step));
        auto const length = static_cast<std::int64_t>(settings_.training.seq_len);
        auto const logits = model_->forward(batch.narrow(1, 0, length));
        auto const target = batch.narrow(1, 1, length).reshape(-1);
        auto const loss = ::torch::nn::functional::cross_entropy(logits.reshape({-1, logits.size(-1)}), target);
        optimizer_->zero_grad();
        auto const value = backward(loss);
        // The position after this step, which is what a checkpoint of it stands for.
        auto const done = step * settings_.training.batch_size;
        epoch_ = static_cast<std::int64_t>(done / settings_.training.num_samples);
        position_ = static_cast<std::int64_t>(done % settings_.training.num_samples);
        return value;
    }

    void update() override { libtorch::whole_step(*optimizer_, *state_); }
    void update_by_layer(running_method& method) override { libtorch::layerwise_step(*optimizer_, *state_, method); }
    std::string update_kernels() const override { return chosen_update(settings_); }
    void synchronize() override {
        if (device_.is_cuda()) ::torch::cuda::synchronize();
    }
    void wait_for_steps() override {
        if (device_.is_cuda()) c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).synchronize();
    }
    std::uint64_t peak_device_bytes() const override {
#if VARVE_TOOL_WITH_CUDA
        if (device_.is_cuda()) return libtorch::peak_device_bytes();
#endif
        return 0;
    }

    libtorch::training_state& training() override { return *state_; }
    varve::state& tensors() override { return state_->state(); }

    void expect_same_run(std::uint64_t step) const override {
        auto differs = [](std::string const& option, auto there, auto here) {
            if (there == here) return;
            auto shown = [](auto v) { return nlohmann::json(v).dump(); };
            throw error(errc::mismatch, "the checkpoint was trained with --" + option + " " + shown(there) + ", not " + shown(here) +
                                            ": give the same, or start over with --fresh --overwrite");
        };
        differs("seed", seed_, static_cast<std::int64_t>(settings_.run.seed));
        differs("num-samples", num_samples_, static_cast<std::int64_t>(settings_.training.num_samples));
        differs("batch-size", batch_size_, static_cast<std::int64_t>(settings_.training.batch_size));
        differs("seq-len", seq_len_, static_cast<std::int64_t>(settings_.training.seq_len));
        differs("nhead", nhead_, static_cast<std::int64_t>(settings_.model.nhead));
        differs("dropout", dropout_, settings_.run.dropout);
        differs("lr", lr_, settings_.run.lr);
        auto const done = step * settings_.training.batch_size, samples = settings_.training.num_samples;
        if (epoch_ != static_cast<std::int64_t>(done / samples) || position_ != static_cast<std::int64_t>(done % samples))
            throw error(errc::mismatch, "the checkpoint of step " + std::to_string(step) + " says epoch " + std::to_string(epoch_) + ", sample " +
                                            std::to_string(position_) + ", which is not where that step ends: it is not one of varve train's");
    }

private:
    /// Returns the loss. On a GPU it is there when the forward pass is done, and only that is waited for: meanwhile the backward
    /// pass is in the stream, and what follows it can be issued before the GPU gets there.
    float backward(::torch::Tensor const& loss) {
#if VARVE_TOOL_WITH_CUDA
        if (device_.is_cuda()) {
            loss_on_host_.copy_(loss.detach(), true);
            auto const known = events_->record(libtorch::current_stream());
            loss.backward();
            if (auto const failed = known.wait()) throw error(failed, "the GPU has failed: " + failed.message());
            return loss_on_host_.item<float>();
        }
#endif
        loss.backward();
        return loss.item<float>();
    }

    /// Batches follow each other through the epochs without a gap; the last of an epoch is filled up from the next.
    ::torch::Tensor samples_of(std::uint64_t step) {
        auto const count = settings_.training.num_samples, size = settings_.training.batch_size;
        std::vector<::torch::Tensor> pieces;
        for (std::uint64_t at = (step - 1) * size, end = at + size; at < end;) {
            auto const first = at % count, taken = std::min(end - at, count - first);
            pieces.push_back(order_of(at / count).narrow(0, static_cast<std::int64_t>(first), static_cast<std::int64_t>(taken)));
            at += taken;
        }
        return pieces.size() == 1 ? pieces.front() : ::torch::cat(pieces);
    }

    /// On the device, so that a step needs no copy from the host, which would wait for the step before.
    ::torch::Tensor const& order_of(std::uint64_t epoch) {
        auto& slot = orders_[epoch % orders_.size()];
        if (!slot.indices.defined() || slot.epoch != epoch) {
            auto host = permutation(settings_.training.num_samples, settings_.run.seed, epoch);
            slot = {epoch, ::torch::tensor(host, ::torch::kLong).to(device_)};
        }
        return slot.indices;
    }

    struct epoch_order {
        std::uint64_t epoch = 0;
        ::torch::Tensor indices;
    };

    settings settings_;
    ::torch::Device device_;
    ::torch::Tensor data_;
    std::shared_ptr<transformer> model_;
    std::unique_ptr<::torch::optim::Adam> optimizer_;
    std::unique_ptr<libtorch::training_state> state_;
    std::array<epoch_order, 2> orders_;  ///< of this epoch and the one before or after
#if VARVE_TOOL_WITH_CUDA
    std::shared_ptr<cuda::event_pool> events_;
    ::torch::Tensor loss_on_host_;
#endif

    std::int64_t epoch_ = 0, position_ = 0;
    std::int64_t seed_ = 0, num_samples_ = 0, batch_size_ = 0, seq_len_ = 0, nhead_ = 0;
    double dropout_ = 0, lr_ = 0;
};

}  // namespace

void require_trainer() {}

std::unique_ptr<trainer> make_trainer(settings const& s) {
    try {
        return std::make_unique<torch_trainer>(s);
    } catch (c10::Error const& e) {
        throw error(std::make_error_code(std::errc::not_enough_memory),
                    std::string("LibTorch cannot build the model: ") + e.what_without_backtrace());
    }
}

std::string chosen_device(settings const& s) {
    if (s.run.device == "cpu") return "cpu";
    bool const usable = VARVE_TOOL_WITH_CUDA && ::torch::cuda::is_available();
    if (s.run.device == "cuda" && !VARVE_TOOL_WITH_CUDA) throw usage_error("--device cuda: this build has no CUDA; take --device cpu");
    if (s.run.device == "cuda" && !usable) throw usage_error("--device cuda: there is no GPU that LibTorch can use here; take --device cpu");
    return usable ? "cuda" : "cpu";
}

std::string chosen_update(settings const& s) {
    bool const on_gpu = chosen_device(s) == "cuda";
    auto const missing = [&](std::string const& name) { return libtorch::missing_update(kind_of(name), on_gpu); };
    if (s.run.update.empty()) return on_gpu && missing("fused").empty() ? "fused" : "plain";
    if (auto const why = missing(s.run.update); !why.empty()) throw usage_error("--update " + s.run.update + ": " + why);
    return s.run.update;
}

trainer_facts facts_of_trainer() { return {TORCH_VERSION, ::at::get_num_threads()}; }

}  // namespace varve::tool
