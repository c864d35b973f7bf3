#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <utility>

#include "build_config.hpp"
#include "methods.hpp"
#include "store_reader.hpp"
#include "varve/checkpointer.hpp"
#include "varve/error.hpp"
#if VARVE_TOOL_WITH_CUDA
#include <type_traits>

#include "varve/cuda/pinned_staging.hpp"
#include "varve/torch/cuda_stream.hpp"
#endif

namespace varve::tool {

/// What orders a save against the training, which is in LibTorch's current stream.
template <class Order>
Order current_order() {
#if VARVE_TOOL_WITH_CUDA
    if constexpr (std::is_same_v<Order, cuda::stream_order>) return {libtorch::current_stream()};
#endif
    return {};
}

/// A checkpointer behind running_method.
template <class Checkpointer>
class strategy final : public running_method {
public:
    template <class... Args>
    strategy(bool by_layer, method_facts facts, Args&&... args) : by_layer_(by_layer), facts_(std::move(facts)), ck_(std::forward<Args>(args)...) {
        facts_.sink = ck_.describe_sink();
        facts_.image_bytes = ck_.image_bytes();
        facts_.pool_bytes = ck_.pool_bytes();
        facts_.block_bytes = Checkpointer::streams ? 0 : ck_.block_bytes();
        facts_.max_in_flight = ck_.max_in_flight();
        if constexpr (requires { ck_.staging().describe(); }) {
            if (!Checkpointer::streams) facts_.staging = ck_.staging().describe();
            facts_.device_bytes = ck_.staging().snapshot_bytes();
            if constexpr (requires { ck_.staging().gpu_bytes(); }) facts_.device_bytes = ck_.staging().gpu_bytes();
        }
    }

    bool updates_by_layer() const override { return by_layer_; }
    bool waits_at_seal() const override { return Checkpointer::waits_at_seal; }
    ticket begin(std::uint64_t step) override { return ck_.begin(step); }
    void before_update() override { ck_.before_update_all(order()); }
    void before_update_of(std::size_t first, std::size_t last) override { ck_.before_update_of(first, last, order()); }
    void layers_ready(std::size_t first, std::size_t last) override { ck_.layers_ready(first, last, order()); }
    ticket seal(metadata_map metadata) override { return ck_.seal(std::move(metadata), order()); }
    void drain() override { ck_.drain(); }
    stall_times stalls() const override { return ck_.stalls(); }
    method_facts facts() const override { return facts_; }

    std::optional<restored_checkpoint> restore(std::optional<std::uint64_t> step, restore_options const& options) override {
        if constexpr (requires { ck_.restore(step, options); })
            return ck_.restore(step, options, order());
        else
            return std::nullopt;
    }

    std::filesystem::path newest_path() const override {
        if constexpr (requires { ck_.files(); }) {
            auto saved = ck_.files().checkpoints();
            if (!saved.empty()) return ck_.files().path() / saved.front().name;
        } else {
            // Somebody else writes it.
            try {
                auto const saved = list_store(monitors_store_).checkpoints;
                if (!saved.empty()) return saved.front().path;
            } catch (error const&) {
            }
        }
        return {};
    }

    /// The folder that a monitor on this machine writes.
    void monitors_store(std::filesystem::path folder) { monitors_store_ = std::move(folder); }

private:
    static auto order() { return current_order<typename Checkpointer::order_type>(); }

    bool by_layer_;
    std::filesystem::path monitors_store_;
    method_facts facts_;
    mutable Checkpointer ck_;
};

}  // namespace varve::tool
