// What stands in for the trainer in a build without LibTorch.

#include "errors.hpp"
#include "trainer.hpp"

namespace varve::tool {

void require_trainer() { throw usage_error("this varve was built without LibTorch; tools/quickstart installs it and builds again"); }

std::unique_ptr<trainer> make_trainer(settings const&) {
    require_trainer();
    return nullptr;
}

std::string chosen_device(settings const& s) {
    if (s.run.device == "cuda") throw usage_error("--device cuda: this build has no CUDA; take --device cpu");
    return "cpu";
}

std::string chosen_update(settings const& s) { return s.run.update.empty() ? "plain" : s.run.update; }

trainer_facts facts_of_trainer() { return {}; }

}  // namespace varve::tool
