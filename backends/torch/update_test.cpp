#include <torch/torch.h>

#include <boost/test/unit_test.hpp>

#include <cmath>
#include <string>
#include <vector>

#include "models.hpp"
#include "support.hpp"
#include "varve/torch/layerwise.hpp"
#include "varve/torch/training_state.hpp"

using namespace varve_test;
using varve::libtorch::training_state;
using varve::libtorch::training_state_options;
using varve::libtorch::update_kind;

namespace {

struct named_kind {
    char const* name;
    update_kind kind;
};

/// The kinds besides plain that this LibTorch has on a CPU.
std::vector<named_kind> fast_kinds() {
    std::vector<named_kind> out;
    for (auto k : {named_kind{"foreach", update_kind::foreach}, named_kind{"fused", update_kind::fused}})
        if (varve::libtorch::missing_update(k.kind, false).empty()) out.push_back(k);
    if (out.empty()) skip("this LibTorch has no foreach and no fused update");
    return out;
}

/// Adam and AdamW with every option that changes the formula, and several groups with rates of their own.
std::vector<named_optimizer> adams() {
    using namespace torch::optim;
    auto out = optimizers();
    out.resize(4);
    out.push_back({"adamw decay", with<AdamW>(AdamWOptions(1e-2).weight_decay(0.2).betas({0.8, 0.95}).eps(1e-6))});
    out.push_back({"two groups", [](std::vector<torch::Tensor> parameters) -> std::unique_ptr<Optimizer> {
                       auto const half = static_cast<std::ptrdiff_t>(parameters.size() / 2);
                       std::vector<torch::Tensor> first(parameters.begin(), parameters.begin() + half),
                           second(parameters.begin() + half, parameters.end());
                       std::vector<OptimizerParamGroup> groups;
                       groups.emplace_back(std::move(first), std::make_unique<AdamOptions>(3e-2));
                       groups.emplace_back(std::move(second), std::make_unique<AdamOptions>(AdamOptions(1e-3).weight_decay(0.1)));
                       return std::make_unique<Adam>(groups);
                   }});
    return out;
}

struct recorder {
    void before_update(std::size_t l) { calls += "b" + std::to_string(l) + " "; }
    void layer_ready(std::size_t l) { calls += "r" + std::to_string(l) + " "; }
    std::string calls;
};

using all_contents = std::vector<std::pair<std::string, std::vector<std::byte>>>;

struct run_result {
    std::vector<float> losses;
    all_contents state;
    std::vector<torch::Tensor> parameters;
};

enum class how { whole, layerwise, layer_by_layer };

/// Six steps; the rate changes after the third, and some parameters miss the second.
template <class Model>
run_result trained(make_optimizer const& make, training_state_options options, how way) {
    torch::manual_seed(7);
    Model model;
    model.train();
    auto optimizer = make(unique_parameters(model));
    training_state training(model, *optimizer, options);
    recorder calls;
    run_result out;
    for (int k = 1; k <= 6; ++k)
        out.losses.push_back(train_step(model, *optimizer, k, [&] {
            if (k == 2) model.parameters().back().mutable_grad() = torch::Tensor();
            if (k == 4)
                for (auto& g : optimizer->param_groups()) g.options().set_lr(g.options().get_lr() / 2);
            if (way == how::whole)
                varve::libtorch::whole_step(*optimizer, training);
            else if (way == how::layerwise)
                varve::libtorch::layerwise_step(*optimizer, training, calls);
            else
                for (std::size_t l = 0; l < training.state().layers.size(); ++l) training.updater().update(l);
        }));
    BOOST_TEST(!recheck(training.state()));
    out.state = contents(training.state());
    for (auto const& p : model.parameters()) out.parameters.push_back(p.detach().clone());
    return out;
}

template <class Check>
void for_both_models(Check check) {
    check(std::type_identity<small_transformer>{});
    check(std::type_identity<odd_model>{});
}

bool has_code(varve::error const& e, varve::errc code) { return e.code() == code && std::string(e.what()).find('\n') == std::string::npos; }

}  // namespace

BOOST_AUTO_TEST_SUITE(torch_update)

BOOST_AUTO_TEST_CASE(some_layers_at_a_time_yield_the_bits_of_the_whole_update_with_every_kind) {
    for (auto const& kind : fast_kinds())
        for (auto const& which : adams()) BOOST_TEST_CONTEXT(kind.name << " " << which.name) {
                for_both_models([&](auto tag) {
                    using model = typename decltype(tag)::type;
                    auto const whole = trained<model>(which.make, {.update = kind.kind}, how::whole);
                    std::vector<std::pair<training_state_options, how>> const cuts{{{.update = kind.kind}, how::layerwise},
                                                                                   {{.update = kind.kind, .update_groups = 2}, how::layerwise},
                                                                                   {{.update = kind.kind}, how::layer_by_layer}};
                    for (auto const& [options, way] : cuts) {
                        auto const parts = trained<model>(which.make, options, way);
                        BOOST_TEST(parts.losses == whole.losses, boost::test_tools::per_element());
                        BOOST_TEST((parts.state == whole.state));
                    }
                });
            }
}

BOOST_AUTO_TEST_CASE(every_kind_computes_what_the_plain_update_does_but_for_rounding) {
    for (auto const& kind : fast_kinds())
        for (auto const& which : adams()) BOOST_TEST_CONTEXT(kind.name << " " << which.name) {
                for_both_models([&](auto tag) {
                    using model = typename decltype(tag)::type;
                    auto const plain = trained<model>(which.make, {}, how::whole),
                               fast = trained<model>(which.make, {.update = kind.kind}, how::whole);
                    for (std::size_t i = 0; i < plain.losses.size(); ++i) BOOST_TEST(std::abs(plain.losses[i] - fast.losses[i]) < 1e-3);
                    // Where a gradient is rounding alone (a bias before a batch norm, those of the attention's keys), Adam makes whole steps of it.
                    BOOST_REQUIRE(plain.state.size() == fast.state.size());
                    for (std::size_t i = 0; i < plain.state.size(); ++i) {
                        BOOST_TEST(plain.state[i].first == fast.state[i].first);
                        if (plain.state[i].first.ends_with(".step"))
                            BOOST_TEST((plain.state[i].second == fast.state[i].second), plain.state[i].first);
                    }
                    std::size_t far = 0;
                    for (std::size_t i = 0; i < plain.parameters.size(); ++i)
                        if (!torch::allclose(plain.parameters[i], fast.parameters[i], 1e-3, 1e-4)) ++far;
                    BOOST_TEST(far <= 2u);
                });
            }
}

BOOST_AUTO_TEST_CASE(a_first_update_differs_from_plain_in_the_last_bits_alone) {
    for (auto const& kind : fast_kinds())
        for (auto const& which : adams()) BOOST_TEST_CONTEXT(kind.name << " " << which.name) {
                auto const once = [&](update_kind k) {
                    auto module = torch::nn::Linear(9, 7);
                    torch::NoGradGuard no_grad;
                    for (auto& p : module->parameters()) {
                        p.copy_(torch::linspace(-1, 1, p.numel()).view(p.sizes()));
                        p.mutable_grad() = torch::linspace(-3, 2, p.numel()).view(p.sizes());
                    }
                    auto optimizer = which.make(module->parameters());
                    training_state training(*module, *optimizer, {.update = k});
                    varve::libtorch::whole_step(*optimizer, training);
                    return std::pair(module->weight.detach().clone(), contents(training.state()).size());
                };
                auto const plain = once(update_kind::plain), fast = once(kind.kind);
                BOOST_TEST(torch::allclose(plain.first, fast.first, 1e-5, 1e-6));
                BOOST_TEST(plain.second == fast.second);
            }
}

BOOST_AUTO_TEST_CASE(a_checkpoint_goes_on_to_the_bit_and_can_be_restored_under_another_kind) {
    for (auto const& kind : fast_kinds())
        for (auto const& which : adams()) BOOST_TEST_CONTEXT(kind.name << " " << which.name) {
                torch::manual_seed(11);
                small_transformer model;
                auto optimizer = which.make(model.parameters());
                training_state training(model, *optimizer, {.update = kind.kind});
                auto const step = [](auto& m, auto& o, auto& t, int k) { return train_step(m, o, k, [&] { varve::libtorch::whole_step(o, t); }); };
                for (int k = 1; k <= 3; ++k) step(model, *optimizer, training, k);
                auto const saved = contents(training.state());
                std::vector<float> expected, got;
                for (int k = 4; k <= 7; ++k) expected.push_back(step(model, *optimizer, training, k));
                auto const end = contents(training.state());

                small_transformer fresh;
                auto fresh_optimizer = which.make(fresh.parameters());
                training_state restored(fresh, *fresh_optimizer, {.update = kind.kind});
                put_back(restored.state(), saved);
                for (int k = 4; k <= 7; ++k) got.push_back(step(fresh, *fresh_optimizer, restored, k));
                BOOST_TEST(got == expected, boost::test_tools::per_element());
                BOOST_TEST((contents(restored.state()) == end));
                // Back again in the object that went on.
                put_back(training.state(), saved);
                BOOST_TEST(step(model, *optimizer, training, 4) == expected[0]);

                small_transformer other;
                auto other_optimizer = which.make(other.parameters());
                training_state plainly(other, *other_optimizer);
                put_back(plainly.state(), saved);
                BOOST_TEST((contents(plainly.state()) == saved));
                BOOST_TEST(step(other, *other_optimizer, plainly, 4) == expected[0]);
                BOOST_TEST(std::abs(step(other, *other_optimizer, plainly, 5) - expected[1]) < 1e-3);
            }
}

BOOST_AUTO_TEST_CASE(layers_are_updated_in_groups_of_similar_size_and_announced_after_them) {
    for (auto const& kind : fast_kinds()) {
        small_transformer model;
        torch::optim::Adam optimizer(model.parameters());
        training_state training(model, optimizer, {.update = kind.kind, .update_groups = 4});
        auto const& groups = training.updater().groups();
        auto const layers = training.state().layers.size();
        BOOST_TEST(groups.size() > 1u);
        BOOST_TEST(groups.size() < layers - 1);
        std::string expected;
        std::size_t next = 0;
        for (auto const& g : groups) {
            BOOST_TEST(g.first == next);
            BOOST_TEST(g.last > g.first);
            for (auto l = g.first; l < g.last; ++l) expected += "b" + std::to_string(l) + " ";
            for (auto l = g.first; l < g.last; ++l) expected += "r" + std::to_string(l) + " ";
            next = g.last;
        }
        BOOST_TEST(next == layers - 1);
        recorder calls;
        train_step(model, optimizer, 1, [&] { varve::libtorch::layerwise_step(optimizer, training, calls); });
        BOOST_TEST(calls.calls == expected + "b" + std::to_string(layers - 1) + " ");
    }
}

BOOST_AUTO_TEST_CASE(what_the_fast_kernels_do_not_take_is_updated_all_the_same) {
    // Overlapping memory, gaps between elements, and a gradient with strides of its own.
    struct strange : torch::nn::Module {
        strange() {
            gapped = register_parameter("gapped", torch::randn({6, 8}).narrow(1, 0, 3));
            dense = register_parameter("dense", torch::randn({6, 3}));
        }
        torch::Tensor gapped, dense;
    };
    for (auto const& kind : fast_kinds()) {
        auto const run = [&](update_kind k) {
            torch::manual_seed(5);
            strange model;
            torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(1e-2));
            training_state training(model, optimizer, {.update = k});
            for (int step = 0; step < 3; ++step) {
                model.gapped.mutable_grad() = torch::full({6, 3}, 0.5 + step);
                model.dense.mutable_grad() = torch::linspace(-1, 1 + step, 18).view({3, 6}).t();
                varve::libtorch::whole_step(optimizer, training);
            }
            return std::pair(model.gapped.detach().clone(), model.dense.detach().clone());
        };
        auto const plain = run(update_kind::plain), fast = run(kind.kind);
        BOOST_TEST(torch::equal(plain.first, fast.first));
        BOOST_TEST(torch::allclose(plain.second, fast.second, 1e-5, 1e-6));
    }
}

BOOST_AUTO_TEST_CASE(a_parameter_that_a_group_has_twice_is_updated_twice) {
    for (auto const& kind : fast_kinds()) {
        auto const run = [&](update_kind k) {
            torch::manual_seed(5);
            odd_model model;
            torch::optim::Adam optimizer(model.parameters());  // lists the tied one twice
            training_state training(model, optimizer, {.update = k});
            train_step(model, optimizer, 1, [&] { varve::libtorch::whole_step(optimizer, training); });
            return std::pair(model.embedding->weight.detach().clone(), contents(training.state()));
        };
        auto const plain = run(update_kind::plain), fast = run(kind.kind);
        BOOST_TEST(torch::allclose(plain.first, fast.first, 1e-4, 1e-6));
        for (std::size_t i = 0; i < plain.second.size(); ++i)
            if (plain.second[i].first == "optimizer.embedding.weight.step") {
                BOOST_TEST(static_cast<int>(plain.second[i].second[0]) == 2);
                BOOST_TEST((plain.second[i].second == fast.second[i].second));
            }
    }
}

BOOST_AUTO_TEST_CASE(gradients_are_let_go_after_the_update) {
    for (auto const& kind : fast_kinds()) {
        odd_model model;
        torch::optim::Adam optimizer(unique_parameters(model));
        training_state training(model, optimizer, {.update = kind.kind});
        train_step(model, optimizer, 1, [&] { varve::libtorch::whole_step(optimizer, training); });
        BOOST_TEST(model.linear->weight.grad().use_count() == 1u);
    }
}

BOOST_AUTO_TEST_CASE(sgd_is_updated_plainly_whatever_is_asked_for) {
    for (auto const& kind : fast_kinds()) {
        auto const make = optimizers()[5].make;
        auto const plain = trained<odd_model>(make, {}, how::whole), asked = trained<odd_model>(make, {.update = kind.kind}, how::layerwise);
        BOOST_TEST((plain.state == asked.state));
        odd_model model;
        auto optimizer = make(unique_parameters(model));
        BOOST_TEST((training_state(model, *optimizer, {.update = kind.kind}).updater().kind() == update_kind::plain));
    }
}

BOOST_AUTO_TEST_CASE(an_optimizer_that_got_other_state_is_refused_before_anything_is_updated) {
    for (auto const& kind : fast_kinds()) {
        auto const refused = [&](auto change) {
            odd_model model;
            torch::optim::Adam optimizer(unique_parameters(model));
            training_state training(model, optimizer, {.update = kind.kind});
            train_step(model, optimizer, 1, [&] { varve::libtorch::whole_step(optimizer, training); });
            change(optimizer);
            BOOST_CHECK_EXCEPTION(varve::libtorch::whole_step(optimizer, training), varve::error,
                                  [](auto const& e) { return has_code(e, varve::errc::state_changed); });
        };
        refused([](auto& o) { o.state().clear(); });
        refused([](auto& o) { static_cast<torch::optim::AdamOptions&>(o.param_groups()[0].options()).amsgrad(true); });
        refused([](auto& o) { o.add_param_group(torch::optim::OptimizerParamGroup({torch::zeros({2}, torch::requires_grad())})); });
        refused([](auto& o) {
            for (auto& [key, state] : o.state()) {
                auto& s = static_cast<torch::optim::AdamParamState&>(*state);
                s.exp_avg(s.exp_avg().clone());
            }
        });
    }
}

BOOST_AUTO_TEST_CASE(a_sparse_gradient_is_refused_as_LibTorch_does) {
    for (auto const& kind : fast_kinds()) {
        odd_model model;
        torch::optim::Adam optimizer(unique_parameters(model));
        training_state training(model, optimizer, {.update = kind.kind});
        model.linear->weight.mutable_grad() = torch::sparse_coo_tensor({12, 12}, torch::kFloat);
        BOOST_CHECK_THROW(varve::libtorch::whole_step(optimizer, training), c10::Error);
    }
}

BOOST_AUTO_TEST_CASE(a_kind_that_this_LibTorch_lacks_is_refused_with_a_word) {
    BOOST_TEST(varve::libtorch::missing_update(update_kind::plain, false).empty());
    for (auto kind : {update_kind::foreach, update_kind::fused}) {
        auto const why = varve::libtorch::missing_update(kind, false);
        if (why.empty()) continue;
        BOOST_TEST(why.find("take plain") != std::string::npos);
        odd_model model;
        torch::optim::Adam optimizer(unique_parameters(model));
        BOOST_CHECK_EXCEPTION(training_state(model, optimizer, {.update = kind}), varve::error,
                              [](auto const& e) { return has_code(e, varve::errc::unsupported); });
    }
}

BOOST_AUTO_TEST_SUITE_END()
