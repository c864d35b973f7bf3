#include <varve/torch/training_state.hpp>

#include <torch/torch.h>

#include <cstdio>

int main() {
    torch::nn::Linear model(4, 2);
    torch::optim::Adam optimizer(model->parameters());
    varve::libtorch::training_state training(*model, optimizer);
    std::puts(training.state().size_bytes() > 0 ? "torch" : "an empty state");
}
