#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "varve/checkpointer.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/sink/memory.hpp"
#include "varve/staging/host.hpp"

namespace varve::conformance {

namespace detail {

/// Checks every image as it is synced: all of its data is of one step, and that step is the one that is due.
class checking_sink {
public:
    struct log {
        std::mutex mutex;
        std::vector<int> steps;  ///< of the images, in the order of their syncs; -1 for a mixed one
    };

    explicit checking_sink(std::uint64_t data_offset_bytes, std::shared_ptr<log> l) : data_offset_(data_offset_bytes), log_(std::move(l)) {}

    class target_type {
    public:
        target_type(memory_sink memory, std::uint64_t data_offset, std::shared_ptr<log> l, open_request const& r)
            : memory_(std::move(memory)), image_(memory_.open(r)), data_offset_(data_offset), log_(std::move(l)) {}
        target_type(target_type&&) = default;
        target_type& operator=(target_type&&) = default;

        void write(std::uint64_t offset_bytes, block const& b, completion c) noexcept {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            image_.write(offset_bytes, b, c);
        }
        std::error_code sync() noexcept {
            if (auto ec = image_.sync()) return ec;
            auto bytes = memory_.newest();
            auto first = bytes->begin() + static_cast<std::ptrdiff_t>(data_offset_);
            bool whole = std::all_of(first, bytes->end(), [&](std::byte x) { return x == *first; });
            std::lock_guard lock(log_->mutex);
            log_->steps.push_back(whole ? std::to_integer<int>(*first) : -1);
            return {};
        }

    private:
        memory_sink memory_;
        memory_sink::target_type image_;
        std::uint64_t data_offset_;
        std::shared_ptr<log> log_;
    };

    target_type open(open_request const& r) { return {memory_sink{}, data_offset_, log_, r}; }
    sink_limits limits() const { return {}; }
    static constexpr bool accepts(memory_kind kind) noexcept { return kind == memory_kind::host; }
    std::string describe() const { return "checks what it is given"; }

private:
    std::uint64_t data_offset_;
    std::shared_ptr<log> log_;
};

}  // namespace detail

/// The laws of concepts/scheduling.hpp and of the checkpointer's loop that code can look at, with pools from one block
/// to more than N images; answers with one line for each that is broken.
template <scheduling P>
std::vector<std::string> check_scheduling(P const& policy) {
    std::vector<std::string> broken;
    auto expect = [&](bool holds, std::string const& law) {
        if (!holds) broken.push_back(law);
    };
    expect(policy.max_in_flight() >= 1 && policy.max_in_flight() == P(policy).max_in_flight(),
           "max_in_flight is at least 1, and the same at every call");
    expect(P::copies != copy_moment::at_layer_ready || P::needs_fixed_layout,
           "blocks that leave before the whole state was seen need a fixed layout");

    constexpr std::size_t layer_count = 3, layer_bytes = block_unit_bytes + 4096 + 3;
    for (std::size_t pool_blocks : {1u, 2u, 64u}) {
        std::vector<std::vector<std::byte>> memory(layer_count, std::vector<std::byte>(layer_bytes));
        state s;
        for (std::size_t l = 0; l < layer_count; ++l) {
            auto name = "layer" + std::to_string(l);
            s.layers.push_back({name, {{name, dtype::U8, {static_cast<std::int64_t>(layer_bytes)}, memory[l].data(), {}}}});
        }
        auto log = std::make_shared<detail::checking_sink::log>();
        auto pool = " (pool of " + std::to_string(pool_blocks) + " blocks)";
        constexpr int steps = 6;
        {
            checkpointer<host_staging, P, detail::checking_sink> ck(s, {pool_blocks * block_unit_bytes, block_unit_bytes}, policy,
                                                                    detail::checking_sink(safetensors{}.lay_out(s).header_bytes, log));
            expect(ck.max_in_flight() <= policy.max_in_flight(), "no more saves are in flight than N" + pool);
            for (int step = 1; step <= steps; ++step) {
                ck.begin(static_cast<std::uint64_t>(step));
                for (std::size_t l = 0; l < layer_count; ++l) {
                    ck.before_update(l);
                    std::fill(memory[l].begin(), memory[l].end(), static_cast<std::byte>(step));
                    ck.layer_ready(l);
                }
                auto ticket = ck.seal();
                if (P::waits == seal_wait::durable) expect(ticket.durable().ready(), "seal waits until it is durable" + pool);
                if (P::waits == seal_wait::staged) expect(ticket.staged().ready(), "seal waits until it is staged" + pool);
            }
            ck.drain();
        }
        std::vector<int> expected(steps);
        for (int i = 0; i < steps; ++i) expected[static_cast<std::size_t>(i)] = i + 1;
        expect(std::find(log->steps.begin(), log->steps.end(), -1) == log->steps.end(), "no checkpoint mixes two steps" + pool);
        expect(log->steps == expected, "saves become durable in step order, and none is lost" + pool);
    }
    return broken;
}

}  // namespace varve::conformance
