#include "random_state.hpp"

#include <cstring>
#include <mutex>
#include <string>

#include "tensor_description.hpp"
#include "varve/error.hpp"

namespace varve::libtorch::detail {

namespace {

/// Of a generator's state, which is bytes in host memory and as long as ever: without LibTorch's dispatcher, which costs more.
void copy_bytes(::at::Tensor const& from, ::at::Tensor const& to) { std::memcpy(to.data_ptr(), from.data_ptr(), to.nbytes()); }

}  // namespace

random_state::random_state(std::set<::c10::DeviceIndex> const& gpus, varve::layer& to) {
    auto generator = ::at::detail::getDefaultCPUGenerator();
    std::lock_guard lock(generator.mutex());
    cpu_ = generator.get_state();
    to.tensors.push_back(described("rng.cpu", cpu_));
    for (auto index : gpus) {
        auto of_gpu = ::at::globalContext().defaultGenerator(::at::Device(::at::kCUDA, index));
        std::lock_guard gpu_lock(of_gpu.mutex());
        gpus_.emplace_back(of_gpu, of_gpu.get_state());
        to.tensors.push_back(described("rng.cuda." + std::to_string(static_cast<int>(index)), gpus_.back().second));
    }
}

void random_state::refresh() {
    {
        auto generator = ::at::detail::getDefaultCPUGenerator();
        std::lock_guard lock(generator.mutex());
        auto* const cpu = ::at::check_generator<::at::CPUGeneratorImpl>(generator);
        auto const engine = cpu->engine().data();
        // In a training on a GPU nothing draws on it, and its state of 5 kB costs an allocation of that size: 0.1 ms.
        if (!cpu_now_.defined() || !engine_of_cpu_now_.is(engine, *cpu)) {
            cpu_now_ = generator.get_state();
            engine_of_cpu_now_ = {engine, cpu->next_float_normal_sample(), cpu->next_double_normal_sample()};
        }
        copy_bytes(cpu_now_, cpu_);
    }
    for (auto& [generator, copy] : gpus_) {
        std::lock_guard lock(generator.mutex());
        try {
            copy_bytes(generator.get_state(), copy);
        } catch (::c10::Error const&) {
            throw error(errc::unsupported, "the state of a GPU's generator cannot be read now: the stream is being captured, or the GPU has failed");
        }
    }
}

void random_state::restore() const {
    try {
        auto generator = ::at::detail::getDefaultCPUGenerator();
        std::lock_guard lock(generator.mutex());
        generator.set_state(cpu_);
    } catch (::c10::Error const&) {
        throw error(errc::malformed, "the checkpoint's rng.cpu is no state of LibTorch's generator");
    }
    for (auto [generator, copy] : gpus_) {
        try {
            std::lock_guard lock(generator.mutex());
            generator.set_state(copy);
        } catch (::c10::Error const&) {
            throw error(errc::malformed, "the checkpoint's rng.cuda is no state of LibTorch's generator");
        }
    }
}

}  // namespace varve::libtorch::detail
