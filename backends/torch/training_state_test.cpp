#include <torch/torch.h>

#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <string>
#include <vector>

#include "models.hpp"
#include "support.hpp"
#include "varve/torch/layerwise.hpp"
#include "varve/torch/training_state.hpp"

using namespace varve_test;
using varve::libtorch::training_state;

namespace {

varve::tensor const* find(varve::state const& s, std::string const& layer, std::string const& name) {
    for (auto const& l : s.layers)
        for (auto const& t : l.tensors)
            if (l.name == layer && t.name == name) return &t;
    return nullptr;
}

/// Calls in order, as a checkpointer would get them.
struct recorder {
    void before_update(std::size_t l) { calls.push_back("b" + std::to_string(l)); }
    void layer_ready(std::size_t l) { calls.push_back("r" + std::to_string(l)); }
    std::vector<std::string> calls;
};

bool has_code(varve::error const& e, varve::errc code) { return e.code() == code && std::string(e.what()).find('\n') == std::string::npos; }

}  // namespace

/// Tensors this small are not worth LibTorch's threads, which would spin beside the other tests.
struct one_thread {
    one_thread() { torch::set_num_threads(1); }
};
BOOST_TEST_GLOBAL_FIXTURE(one_thread);

BOOST_AUTO_TEST_SUITE(torch_training_state)

BOOST_AUTO_TEST_CASE(layers_and_names_follow_the_modules) {
    odd_model model;
    torch::optim::Adam optimizer(unique_parameters(model), torch::optim::AdamOptions(1e-3).amsgrad(true));
    training_state training(model, optimizer);
    std::int64_t epoch = 3;
    training.add_user("epoch", epoch);
    auto& s = training.state();

    std::vector<std::string> names;
    for (auto const& l : s.layers) names.push_back(l.name);
    std::vector<std::string> const expected{"model", "model.embedding", "model.linear", "model.norm", "model.tied", "run"};
    BOOST_TEST(names == expected, boost::test_tools::per_element());

    BOOST_TEST(find(s, "model.linear", "model.linear.weight"));
    BOOST_TEST(find(s, "model.linear", "optimizer.linear.weight.exp_avg"));
    BOOST_TEST(find(s, "model.linear", "optimizer.linear.weight.exp_avg_sq"));
    BOOST_TEST(find(s, "model.linear", "optimizer.linear.weight.max_exp_avg_sq"));
    auto const* step = find(s, "model.linear", "optimizer.linear.bias.step");
    BOOST_REQUIRE(step);
    BOOST_TEST((step->type == varve::dtype::I64 && step->shape.empty()));
    BOOST_TEST(find(s, "model.norm", "model.norm.running_mean"));
    BOOST_TEST(find(s, "model.norm", "model.norm.num_batches_tracked"));
    BOOST_TEST(find(s, "run", "model.shifts.offset"));
    BOOST_TEST(find(s, "run", "rng.cpu"));
    auto const* lr = find(s, "run", "optimizer.group.0.lr");
    BOOST_REQUIRE(lr);
    BOOST_TEST((lr->type == varve::dtype::F64 && lr->shape.empty()));
    BOOST_TEST(find(s, "run", "user.epoch"));
    BOOST_TEST(find(s, "model.tied", "model.tied.bias"));
    BOOST_TEST(!find(s, "model.tied", "model.tied.weight"));
    BOOST_TEST(s.aliases.at("model.tied.weight") == "model.embedding.weight");
    auto const* strided = find(s, "model", "model.strided");
    BOOST_REQUIRE(strided);
    std::vector<std::int64_t> const strides{1, 5};
    BOOST_TEST(strided->strides == strides, boost::test_tools::per_element());
    BOOST_TEST(find(s, "model", "model.frozen"));
}

BOOST_AUTO_TEST_CASE(parameters_that_the_optimizer_does_not_have_are_saved_as_model_only) {
    odd_model model;
    torch::optim::Adam optimizer(model.linear->parameters());
    training_state training(model, optimizer);
    BOOST_TEST(find(training.state(), "model.tied", "model.tied.bias"));
    BOOST_TEST(!find(training.state(), "model.tied", "optimizer.tied.bias.step"));
}

BOOST_AUTO_TEST_CASE(a_step_layer_by_layer_yields_the_bits_of_a_whole_step) {
    for (auto const& [name, make] : optimizers()) {
        BOOST_TEST_CONTEXT(name) {
            auto run = [&](auto tag, bool by_layer) {
                torch::manual_seed(7);
                typename decltype(tag)::type model;
                model.train();
                auto optimizer = make(model.parameters());
                training_state training(model, *optimizer);
                recorder calls;
                std::vector<float> losses;
                for (int k = 1; k <= 6; ++k)
                    losses.push_back(train_step(model, *optimizer, k, [&] {
                        if (by_layer)
                            varve::libtorch::layerwise_step(*optimizer, training, calls);
                        else
                            optimizer->step();
                    }));
                if (by_layer) {
                    auto layers = training.state().layers.size();
                    BOOST_REQUIRE(calls.calls.size() == 6 * (2 * layers - 1));
                    for (std::size_t l = 0; l + 1 < layers; ++l) {
                        BOOST_TEST(calls.calls[2 * l] == "b" + std::to_string(l));
                        BOOST_TEST(calls.calls[2 * l + 1] == "r" + std::to_string(l));
                    }
                    BOOST_TEST(calls.calls[2 * layers - 2] == "b" + std::to_string(layers - 1));
                }
                return std::pair(losses, contents(training.state()));
            };
            auto same = [&](auto tag) {
                auto whole = run(tag, false), layered = run(tag, true);
                BOOST_TEST(whole.first == layered.first, boost::test_tools::per_element());
                BOOST_TEST((whole.second == layered.second));
            };
            same(std::type_identity<small_transformer>{});
            same(std::type_identity<odd_model>{});
        }
    }
}

BOOST_AUTO_TEST_CASE(a_training_state_changes_no_bit_of_the_training) {
    for (auto const& [name, make] : optimizers()) {
        BOOST_TEST_CONTEXT(name) {
            auto run = [&](bool observed) {
                torch::manual_seed(3);
                odd_model model;
                auto optimizer = make(unique_parameters(model));
                std::unique_ptr<training_state> training;
                if (observed) training = std::make_unique<training_state>(model, *optimizer);
                std::vector<float> losses;
                for (int k = 1; k <= 6; ++k) {
                    losses.push_back(train_step(model, *optimizer, k));
                    if (observed && k % 2 == 0) contents(training->state());
                }
                return losses;
            };
            BOOST_TEST(run(false) == run(true), boost::test_tools::per_element());
        }
    }
}

BOOST_AUTO_TEST_CASE(a_restore_into_fresh_objects_continues_with_the_same_bits) {
    auto check = [](auto tag, named_optimizer const& which, int saved_at) {
        using model_type = typename decltype(tag)::type;
        torch::manual_seed(11);
        model_type model;
        auto optimizer = which.make(model.parameters());
        training_state training(model, *optimizer);
        std::int64_t epoch = 0;
        double best = 0;
        auto seen = torch::zeros({2});
        training.add_user("epoch", epoch);
        training.add_user("best", best);
        training.add_user("seen", seen);
        for (int k = 1; k <= saved_at; ++k) best = train_step(model, *optimizer, k);
        epoch = saved_at;
        seen.fill_(saved_at);
        optimizer->param_groups()[0].options().set_lr(0.005);
        auto const saved = contents(training.state());
        BOOST_TEST(!recheck(training.state()));
        std::vector<float> expected, got;
        for (int k = saved_at + 1; k <= saved_at + 4; ++k) expected.push_back(train_step(model, *optimizer, k));
        BOOST_TEST(!recheck(training.state()));
        auto const end = contents(training.state());

        torch::manual_seed(99);
        model_type fresh;
        auto fresh_optimizer = which.make(fresh.parameters());
        training_state restored(fresh, *fresh_optimizer);
        std::int64_t fresh_epoch = 0;
        double fresh_best = 0;
        auto fresh_seen = torch::zeros({2});
        restored.add_user("epoch", fresh_epoch);
        restored.add_user("best", fresh_best);
        restored.add_user("seen", fresh_seen);
        put_back(restored.state(), saved);
        BOOST_TEST(!recheck(restored.state()));
        BOOST_TEST(fresh_epoch == saved_at);
        BOOST_TEST((saved_at == 0 || fresh_best != 0));
        BOOST_TEST(fresh_seen[1].item<float>() == saved_at);
        BOOST_TEST(fresh_optimizer->param_groups()[0].options().get_lr() == 0.005);
        BOOST_TEST((contents(restored.state()) == saved));
        for (int k = saved_at + 1; k <= saved_at + 4; ++k) got.push_back(train_step(fresh, *fresh_optimizer, k));
        fresh_epoch = epoch, fresh_best = best;
        BOOST_TEST(got == expected, boost::test_tools::per_element());
        BOOST_TEST((contents(restored.state()) == end));

        // Back to the same checkpoint in the objects that went on from it.
        put_back(training.state(), saved);
        BOOST_TEST(!recheck(training.state()));
        BOOST_TEST(train_step(model, *optimizer, saved_at + 1) == expected[0]);
    };
    for (auto const& which : optimizers())
        for (int saved_at : {0, 3}) BOOST_TEST_CONTEXT(which.name << " at " << saved_at) {
                check(std::type_identity<small_transformer>{}, which, saved_at);
                check(std::type_identity<odd_model>{}, which, saved_at);
            }
}

BOOST_AUTO_TEST_CASE(momentum_has_a_flag_until_the_first_update_made_it_and_stays_in_place_then) {
    odd_model model;
    torch::optim::SGD optimizer(unique_parameters(model), torch::optim::SGDOptions(0.1).momentum(0.9));
    training_state training(model, optimizer);
    auto& s = training.state();
    auto const* flag = find(s, "model.linear", "optimizer.linear.weight.momentum_buffer.set");
    auto const* buffer = find(s, "model.linear", "optimizer.linear.weight.momentum_buffer");
    BOOST_REQUIRE(flag);
    BOOST_REQUIRE(buffer);
    BOOST_TEST((flag->type == varve::dtype::BOOL));
    contents(s);
    BOOST_TEST(*static_cast<bool*>(flag->data) == false);
    train_step(model, optimizer, 1);
    BOOST_TEST(!recheck(s));
    contents(s);
    BOOST_TEST(*static_cast<bool*>(flag->data) == true);
    auto before = static_cast<float*>(buffer->data)[0];
    train_step(model, optimizer, 2);
    BOOST_TEST(!recheck(s));
    BOOST_TEST(static_cast<float*>(buffer->data)[0] != before);
    auto const* unused = find(s, "model", "optimizer.unused.momentum_buffer.set");
    BOOST_REQUIRE(unused);
    BOOST_TEST(*static_cast<bool*>(unused->data) == false);
}

BOOST_AUTO_TEST_CASE(what_changes_between_saves_is_saved_from_a_copy) {
    odd_model model;
    torch::optim::Adam optimizer(unique_parameters(model));
    training_state training(model, optimizer);
    auto& s = training.state();
    contents(s);
    auto const* mean = find(s, "model.norm", "model.norm.running_mean");
    auto before = static_cast<float*>(mean->data)[0];
    model.loss(1);  // a forward pass, while a save might read the state
    BOOST_TEST(static_cast<float*>(mean->data)[0] == before);
    s.refresh(s.index_of("model.norm"));
    BOOST_TEST(static_cast<float*>(mean->data)[0] != before);
}

BOOST_AUTO_TEST_CASE(recheck_finds_what_has_moved) {
    auto changed = [](auto change) {
        odd_model model;
        torch::optim::Adam optimizer(unique_parameters(model));
        training_state training(model, optimizer);
        train_step(model, optimizer, 1);
        BOOST_TEST(!recheck(training.state()));
        {
            torch::NoGradGuard no_grad;
            change(model, optimizer);
        }
        return recheck(training.state()) == varve::errc::state_changed;
    };
    BOOST_TEST(changed([](auto& m, auto&) { m.linear->weight.set_data(m.linear->weight.clone()); }));
    BOOST_TEST(changed([](auto& m, auto&) { m.to(torch::kDouble); }));
    BOOST_TEST(changed([](auto& m, auto&) { m.linear->weight.t_(); }));
    BOOST_TEST(changed([](auto& m, auto&) { m.norm->running_mean.set_data(torch::zeros({13})); }));
    BOOST_TEST(changed([](auto&, auto& o) { o.state().clear(); }));
    BOOST_TEST(changed([](auto&, auto& o) { o.add_param_group(torch::optim::OptimizerParamGroup({torch::zeros({2}, torch::requires_grad())})); }));
}

BOOST_AUTO_TEST_CASE(a_restore_needs_the_module_where_it_was_and_gives_the_optimizer_its_state) {
    odd_model model;
    torch::optim::Adam optimizer(unique_parameters(model));
    training_state training(model, optimizer);
    auto& s = training.state();
    auto const moved = [&] {
        for (std::size_t l = 0; l < s.layers.size(); ++l)
            if (auto ec = s.recheck_to_restore(l)) return ec;
        return std::error_code();
    };
    optimizer.state().clear();
    BOOST_TEST((recheck(s) == varve::errc::state_changed));
    BOOST_TEST(!moved());
    s.restored();
    BOOST_TEST(!recheck(s));
    model.to(torch::kDouble);
    BOOST_TEST((moved() == varve::errc::state_changed));
}

BOOST_AUTO_TEST_CASE(what_cannot_be_saved_is_refused_by_name) {
    odd_model model;
    torch::optim::RMSprop other(unique_parameters(model));
    BOOST_CHECK_EXCEPTION(training_state(model, other), varve::error, [](auto const& e) { return has_code(e, varve::errc::unsupported); });
    torch::optim::Adam foreign({torch::zeros({2}, torch::requires_grad())});
    BOOST_CHECK_EXCEPTION(training_state(model, foreign), varve::error, [](auto const& e) { return has_code(e, varve::errc::unsupported); });
    struct wide : torch::nn::Module {
        wide() { register_parameter("z", torch::zeros({2}, torch::kComplexDouble)); }
    } strange;
    torch::optim::Adam empty(strange.parameters());
    BOOST_CHECK_EXCEPTION(training_state(strange, empty), varve::error, [](auto const& e) {
        return has_code(e, varve::errc::unsupported) && std::string(e.what()).find("model.z") != std::string::npos;
    });
}

BOOST_AUTO_TEST_CASE(an_update_that_throws_leaves_the_groups_whole) {
    odd_model model;
    torch::optim::Adam optimizer(unique_parameters(model));
    training_state training(model, optimizer);
    auto const count = optimizer.param_groups()[0].params().size();
    train_step(model, optimizer, 1);
    model.linear->weight.mutable_grad() = torch::sparse_coo_tensor({12, 12}, torch::kFloat);
    recorder calls;
    BOOST_CHECK_THROW(varve::libtorch::layerwise_step(optimizer, training, calls), c10::Error);
    BOOST_TEST(optimizer.param_groups()[0].params().size() == count);
}

BOOST_AUTO_TEST_SUITE_END()
