#include <torch/torch.h>

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <boost/test/unit_test.hpp>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <future>
#include <map>
#include <optional>
#include <thread>
#include <vector>

#include "device_model.hpp"
#include "files.hpp"
#include "late_stream.hpp"
#include "models.hpp"
#include "optimizer_state.hpp"
#include "plain_sinks.hpp"
#include "support.hpp"
#include "varve/checkpointer.hpp"
#include "varve/cuda/pinned_staging.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/torch/cuda_stream.hpp"
#include "varve/torch/layerwise.hpp"
#include "varve/torch/training_state.hpp"

using namespace varve_test;
using namespace std::chrono_literals;
using varve::cuda::pinned_staging;
using varve::libtorch::training_state;
using varve::libtorch::update_kind;

namespace {

constexpr std::size_t block = varve::block_unit_bytes;

/// Files, slow or held back, written from page-locked memory.
struct pinned_file_sink : plain_file_sink {
    using plain_file_sink::plain_file_sink;
    static constexpr bool accepts(varve::memory_kind kind) { return kind != varve::memory_kind::device; }
};

template <class Scheduling>
using checkpointer = varve::checkpointer<pinned_staging, Scheduling, pinned_file_sink>;

varve::cuda::stream_order here() { return {varve::libtorch::current_stream()}; }

/// Tells a checkpointer about layers that are updated in LibTorch's current stream.
template <class Checkpointer>
class in_current_stream {
public:
    explicit in_current_stream(Checkpointer& ck) : ck_(ck) {}
    void before_update_of(std::size_t first, std::size_t last) { ck_.before_update_of(first, last, here()); }
    void layers_ready(std::size_t first, std::size_t last) { ck_.layers_ready(first, last, here()); }

private:
    Checkpointer& ck_;
};

struct perceptron : torch::nn::Module {
    perceptron() {
        first = register_module("first", torch::nn::Linear(32, 48));
        second = register_module("second", torch::nn::Linear(48, 8));
    }
    torch::Tensor loss(torch::Tensor const& x) { return second(torch::tanh(first(x))).square().mean(); }
    torch::nn::Linear first{nullptr}, second{nullptr};
};

void add(std::vector<torch::Tensor>& to, torch::optim::AdamParamState const& s) {
    to.insert(to.end(), {s.exp_avg().clone(), s.exp_avg_sq().clone(), torch::full({1}, s.step(), torch::kLong)});
}
void add(std::vector<torch::Tensor>& to, torch::optim::SGDParamState const& s) { to.push_back(s.momentum_buffer().clone()); }

/// A model on the GPU, with the same weights each time, and what trains it.
template <class Model, class Optimizer, class Options, class State>
struct trainee {
    explicit trainee(Options const& options, update_kind kind = update_kind::plain) {
        torch::manual_seed(5);
        model = std::make_shared<Model>();
        model->to(torch::Device(torch::kCUDA));
        model->train();
        optimizer = std::make_unique<Optimizer>(model->parameters(), options);
        training = std::make_unique<training_state>(*model, *optimizer, varve::libtorch::training_state_options{.update = kind, .update_groups = 3});
        // All of that is in the default stream.
        torch::cuda::synchronize();
    }
    void update() { varve::libtorch::whole_step(*optimizer, *training); }
    template <class Listener>
    void update_by_layer(Listener& listener) {
        varve::libtorch::layerwise_step(*optimizer, *training, listener);
    }

    /// LibTorch's own copies, in the current stream, of the parameters and of what the optimizer keeps of them.
    std::vector<torch::Tensor> copies() const {
        torch::NoGradGuard no_grad;
        std::vector<torch::Tensor> out;
        for (auto const& p : model->parameters()) {
            out.push_back(p.detach().clone());
            add(out, static_cast<State const&>(*optimizer->state().at(varve::libtorch::detail::state_key(p))));
        }
        return out;
    }

    std::shared_ptr<Model> model;
    std::unique_ptr<Optimizer> optimizer;
    std::unique_ptr<training_state> training;
};

auto fused_transformer() {
    using namespace torch::optim;
    return trainee<small_transformer, Adam, AdamOptions, AdamParamState>(AdamOptions(1e-2), update_kind::fused);
}
auto plain_perceptron() {
    using namespace torch::optim;
    return trainee<perceptron, SGD, SGDOptions, SGDParamState>(SGDOptions(0.1).momentum(0.9));
}

/// What was copied at each step with a save.
using copies_of_steps = std::map<std::uint64_t, std::vector<torch::Tensor>>;

constexpr std::size_t kept = 20;

/// Every one of the steps can be restored into a fresh model, and has the bits that were copied then.
template <class Scheduling, class Make>
void expect_checkpoints(std::filesystem::path const& folder, copies_of_steps const& expected, Make make) {
    auto fresh = make();
    checkpointer<Scheduling> ck(fresh.training->state(), pinned_staging(2 * block, block), Scheduling{}, pinned_file_sink(), folder, {.keep = kept});
    for (auto const& [step, tensors] : expected) BOOST_TEST_CONTEXT("step " << step) {
            auto const restored = ck.restore(step, {}, here());
            BOOST_REQUIRE(restored);
            auto const got = fresh.copies();
            BOOST_REQUIRE(got.size() == tensors.size());
            for (std::size_t i = 0; i < got.size(); ++i) BOOST_TEST(torch::equal(got[i], tensors[i]), "tensor " << i);
        }
}

constexpr int steps = 12;

std::vector<float> on_host(std::vector<torch::Tensor> const& losses) {
    std::vector<float> out;
    for (auto const& l : losses) out.push_back(l.item<float>());
    return out;
}

/// The losses of a training without a checkpoint, in the default stream.
std::vector<float> losses_without_saves() {
    auto run = fused_transformer();
    std::vector<torch::Tensor> losses;
    for (int step = 1; step <= steps; ++step) {
        auto const loss = run.model->loss(step);
        losses.push_back(loss.detach());
        run.optimizer->zero_grad();
        loss.backward();
        run.update();
    }
    return on_host(losses);
}

/// Trains in `stream`, with a slow sink and updates that come late; checks every checkpoint and returns the losses.
template <class Scheduling>
std::vector<float> trained_in(c10::cuda::CUDAStream stream, Scheduling scheduling, std::size_t snapshots) {
    temporary_folder folder;
    auto control = std::make_shared<sink_control>();
    control->delay = 15ms;
    auto run = fused_transformer();
    c10::cuda::CUDAStreamGuard guard(stream);
    BOOST_TEST((here().stream == stream.stream()));
    copies_of_steps expected;
    std::vector<torch::Tensor> losses;
    {
        late_stream late(stream.stream());
        checkpointer<Scheduling> ck(run.training->state(), pinned_staging(2 * block, block, {.snapshots = snapshots}), scheduling,
                                    pinned_file_sink(control), folder.path(), {.keep = kept});
        in_current_stream listener(ck);
        std::vector<varve::ticket> saves;
        for (int step = 1; step <= steps; ++step) {
            auto const loss = run.model->loss(step);
            losses.push_back(loss.detach());
            run.optimizer->zero_grad();
            loss.backward();
            auto const opener = late.hold();
            bool const due = step % 3 != 0;
            if (due) ck.begin(static_cast<std::uint64_t>(step));
            if constexpr (std::is_same_v<Scheduling, varve::layerwise<2>>) {
                run.update_by_layer(listener);
            } else {
                ck.before_update_all(here());
                run.update();
            }
            if (!due) continue;
            saves.push_back(ck.seal({}, here()));
            expected.emplace(step, run.copies());
        }
        for (auto const& s : saves) BOOST_TEST(!s.durable().wait());
    }
    expect_checkpoints<Scheduling>(folder.path(), expected, fused_transformer);
    auto out = on_host(losses);
    torch::cuda::synchronize();
    return out;
}

class deterministic {
public:
    deterministic() { ::at::globalContext().setDeterministicAlgorithms(true, false); }
    ~deterministic() { ::at::globalContext().setDeterministicAlgorithms(false, false); }
    deterministic(deterministic const&) = delete;
    deterministic& operator=(deterministic const&) = delete;
};

/// In a stream of LibTorch's and in one that the user has made, with and without snapshots: no checkpoint mixes steps, no loss changes.
template <class Scheduling>
void trains_in_side_streams(Scheduling scheduling) {
    if (!have_gpu()) return;
    deterministic bits;
    auto const expected = losses_without_saves();
    // LibTorch keeps memory by stream, so this one stays.
    static user_stream own;
    int device = 0;
    expect(::cudaGetDevice(&device));
    for (auto stream : {c10::cuda::getStreamFromPool(), c10::cuda::getStreamFromExternal(own.stream, static_cast<c10::DeviceIndex>(device))})
        for (std::size_t snapshots : {0, 2}) {
            BOOST_TEST_CONTEXT("snapshots " << snapshots << (stream.stream() == own.stream ? ", own stream" : "")) {
                BOOST_TEST(trained_in(stream, scheduling, snapshots) == expected, boost::test_tools::per_element());
            }
        }
}

/// Another batch in the memory that a graph reads.
void fill(torch::Tensor const& input, std::uint64_t step) {
    torch::NoGradGuard no_grad;
    auto const counts = torch::arange(input.numel(), input.options()).view(input.sizes());
    auto batch = input;
    batch.copy_(torch::sin(counts * (0.1 * static_cast<double>(step))));
}

bool is_unsupported(varve::error const& e) { return e.code() == varve::errc::unsupported; }

}  // namespace

/// cuBLAS computes the same bits in every run where it finds this before its first product.
struct repeatable_products {
    repeatable_products() { ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0); }
};
BOOST_TEST_GLOBAL_FIXTURE(repeatable_products);

BOOST_AUTO_TEST_SUITE(torch_gpu)

BOOST_AUTO_TEST_CASE(async_saves_of_a_training_in_a_side_stream_have_the_bits_of_their_steps) { trains_in_side_streams(varve::async<2>{}); }
BOOST_AUTO_TEST_CASE(layerwise_saves_of_a_training_in_a_side_stream_have_the_bits_of_their_steps) { trains_in_side_streams(varve::layerwise<2>{}); }

BOOST_AUTO_TEST_CASE(a_step_in_a_captured_graph_is_saved_with_before_update_ahead_of_each_replay) {
    if (!have_gpu()) return;
    for (std::size_t snapshots : {0, 2}) {
        temporary_folder folder;
        auto control = std::make_shared<sink_control>();
        control->delay = 15ms;
        auto run = plain_perceptron();
        c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
        auto const input = torch::zeros({8, 32}, torch::kCUDA);
        copies_of_steps expected;
        {
            late_stream late(here().stream);
            checkpointer<varve::async<2>> ck(run.training->state(), pinned_staging(2 * block, block, {.snapshots = snapshots}), varve::async<2>{},
                                             pinned_file_sink(control), folder.path(), {.keep = kept});
            at::cuda::CUDAGraph graph;
            std::vector<varve::ticket> saves;
            std::atomic<bool> captured = false;
            std::future<void> opener;
            auto const whole_step = [&] {
                run.model->loss(input).backward();
                run.update();
            };
            for (std::uint64_t step = 1; step <= steps; ++step) {
                if (step == 3) {
                    // In the strictest mode, with two saves on varve's threads, the second of which waits for its step. The gradients
                    // come from the graph's memory.
                    run.optimizer->zero_grad();
                    graph.capture_begin();
                    BOOST_CHECK_EXCEPTION(ck.before_update_all(here()), varve::error, is_unsupported);
                    whole_step();
                    std::this_thread::sleep_for(20ms);
                    graph.capture_end();
                    captured = true;
                }
                opener = {};
                fill(input, step);
                opener = step == 2 ? late.hold_until([&] { return captured.load(); }) : late.hold();
                ck.before_update_all(here());
                if (step < 3) {
                    run.optimizer->zero_grad();
                    whole_step();
                } else {
                    graph.replay();
                }
                if (step % 4 == 0) continue;
                saves.push_back(ck.save(step, {}, here()));
                expected.emplace(step, run.copies());
            }
            for (auto const& s : saves) BOOST_TEST(!s.durable().wait());
            torch::cuda::synchronize();
            run.optimizer->zero_grad();
        }
        // Every replay has changed the model.
        for (auto a = expected.begin(), b = std::next(a); b != expected.end(); ++a, ++b) BOOST_TEST(!torch::equal(a->second[0], b->second[0]));
        expect_checkpoints<varve::async<2>>(folder.path(), expected, plain_perceptron);
    }
}

BOOST_AUTO_TEST_CASE(layerwise_calls_in_a_capture_are_unsupported_and_its_graph_trains) {
    if (!have_gpu()) return;
    for (std::size_t snapshots : {0, 2}) {
        temporary_folder folder;
        auto control = std::make_shared<sink_control>();
        auto run = plain_perceptron();
        c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
        auto const input = torch::zeros({8, 32}, torch::kCUDA);
        fill(input, 1);
        copies_of_steps expected;
        {
            checkpointer<varve::layerwise<2>> ck(run.training->state(), pinned_staging(2 * block, block, {.snapshots = snapshots}),
                                                 varve::layerwise<2>{}, pinned_file_sink(control), folder.path(), {.keep = kept});
            in_current_stream listener(ck);
            late_stream late(here().stream);
            at::cuda::CUDAGraph waiting, announcing;
            control->door.close();
            run.model->loss(input).backward();
            // The save waits for its step until the first capture is over.
            std::atomic<bool> captured = false;
            auto const opener = late.hold_until([&] { return captured.load(); });
            ck.begin(1);
            run.update_by_layer(listener);
            auto const first = ck.seal({}, here());
            expected.emplace(1, run.copies());

            // A graph cannot wait for the save that reads the layers; the user updates them all the same.
            run.optimizer->zero_grad();
            waiting.capture_begin();
            run.model->loss(input).backward();
            BOOST_CHECK_EXCEPTION(run.update_by_layer(listener), varve::error, is_unsupported);
            run.update();
            waiting.capture_end();
            captured = true;

            // Nor can one be copied from, where nothing had to be waited for.
            ck.before_update_all(here());
            run.optimizer->zero_grad();
            announcing.capture_begin();
            auto const refused = ck.begin(2);
            run.model->loss(input).backward();
            run.update_by_layer(listener);
            try {
                ck.seal({}, here());
            } catch (varve::error const& e) {
                // LibTorch hands out no generator's state in a capture.
                BOOST_TEST(is_unsupported(e), e.what());
            }
            announcing.capture_end();
            control->door.open();
            BOOST_TEST((refused.durable().wait() == varve::errc::unsupported));
            BOOST_TEST(!first.durable().wait());

            // Both graphs are whole, and so is what is saved behind them.
            for (std::uint64_t step = 3; step <= 8; ++step) {
                ck.before_update_all(here());
                (step % 2 == 0 ? waiting : announcing).replay();
                auto const save = ck.save(step, {}, here());
                expected.emplace(step, run.copies());
                BOOST_TEST(!save.durable().wait());
            }
            torch::cuda::synchronize();
            run.optimizer->zero_grad();
        }
        for (auto a = expected.begin(), b = std::next(a); b != expected.end(); ++a, ++b) BOOST_TEST(!torch::equal(a->second[0], b->second[0]));
        expect_checkpoints<varve::layerwise<2>>(folder.path(), expected, plain_perceptron);
    }
}

BOOST_AUTO_TEST_SUITE_END()
