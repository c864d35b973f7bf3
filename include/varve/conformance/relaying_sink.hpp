#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "varve/concepts/relaying_sink.hpp"
#include "varve/detail/block_pool.hpp"
#include "varve/detail/digest.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"

namespace varve::conformance {

/// How a relaying sink's laws are looked at.
template <relaying_sink S>
struct relaying_fixture {
    /// A sink to break in, for a store that it may find as an earlier one left it; called several times.
    std::function<S()> make;
    /// Memory for a staging of so many bytes, aligned to 4,096, which lives as long as the sinks; such as shares them with a receiver.
    std::span<std::byte> memory;
    /// The checkpoint of that step as the receiver has committed it; nothing where it keeps none.
    std::function<std::optional<std::vector<std::byte>>(std::uint64_t step)> read_back;
    std::chrono::seconds patience{60};
};

namespace detail {

/// Runs the laws one after the other and lists what is broken.
template <relaying_sink S>
class relaying_laws {
public:
    static constexpr std::size_t block_bytes = block_unit_bytes;
    static constexpr std::size_t blocks = 6;

    explicit relaying_laws(relaying_fixture<S> const& fixture)
        : fixture_(fixture), bytes_(2 * block_bytes + 12'345),
          pool_(std::make_shared<varve::detail::block_pool>(varve::detail::regions_of(fixture.memory.first(blocks * block_bytes), block_bytes),
                                                            block_bytes, nullptr)) {
        state_.layers = {{"layer", {{"model.weight", dtype::U8, {static_cast<std::int64_t>(bytes_.size())}, bytes_.data(), {}, memory_kind::host}}}};
        image_ = format_.lay_out(state_);
    }

    std::vector<std::string> run() {
        publishes();
        for (unsigned threads : {1u, 4u})
            for (bool lent : {true, false}) {
                auto s = introduced();
                if (!lent && !s.takes_digests()) continue;
                for (int i = 0; i < 4; ++i) whole(s, threads, lent);
            }
        moved_while_open();
        unwanted();
        not_waited_for();
        loans_end();
        return std::move(broken_);
    }

private:
    using target_type = typename S::target_type;

    struct answer {
        std::atomic<int> times{0};
        std::atomic<int> place{0};  ///< among all answers
        std::mutex mutex;
        std::error_code error;
        std::atomic<int>* count = nullptr;

        completion of() noexcept {
            return {[](void* context, std::error_code ec) noexcept {
                        auto& a = *static_cast<answer*>(context);
                        std::lock_guard lock(a.mutex);
                        a.error = ec;
                        if (a.count) a.place = ++*a.count;
                        ++a.times;
                    },
                    this};
        }
    };

    void expect(bool holds, std::string const& law) {
        if (!holds) broken_.push_back(law);
    }
    template <class F>
    bool comes(F&& f) {
        for (auto const until = std::chrono::steady_clock::now() + fixture_.patience; std::chrono::steady_clock::now() < until;
             std::this_thread::sleep_for(std::chrono::milliseconds(1)))
            if (f()) return true;
        return f();
    }

    S introduced() {
        auto s = fixture_.make();
        slots_.clear();
        for (auto region : pool_->regions()) {
            if constexpr (registering_sink<S>)
                slots_.push_back(s.register_memory(region));
            else
                slots_.push_back(unregistered);
        }
        s.introduce({state_, image_, format_.extension(), block_bytes, 2, when_busy::block});
        return s;
    }
    target_type open(S& s) { return s.open({-1, {}, image_.size_bytes, ++step_}); }

    void publishes() {
        auto s = introduced();
        auto const l = s.limits();
        for (auto a : {l.memory_alignment, l.offset_alignment, l.length_alignment})
            expect(std::has_single_bit(a), "limits: alignments are powers of two");
        expect(l.queue_depth >= 1, "limits: the queue depth is at least 1");
        expect(S::accepts(memory_kind::host) || S::accepts(memory_kind::pinned) || S::accepts(memory_kind::device), "accepts: some memory");
        expect(!s.describe().empty() && s.describe().find('\n') == std::string::npos, "describe: one line");
        bool const digests = s.takes_digests();
        {
            [[maybe_unused]] auto target = open(s);
        }
        expect(s.takes_digests() == digests, "takes_digests: the same at every call");
    }

    /// Stages and writes the whole image from several threads, the last block first; returns when each write is answered.
    void write_all(target_type& target, unsigned threads, bool lent, std::string const& what) {
        for (auto& b : bytes_) b = static_cast<std::byte>((seed_ = seed_ * 1664525u + 1013904223u) >> 24);
        block_map const map(image_, state_, block_bytes);
        std::vector<answer> answers(map.blocks().size());
        std::vector<varve::detail::block_pool::buffer> buffers;
        for (auto const& plan : map.blocks()) {
            buffers.push_back(varve::detail::block_pool::acquire(pool_, {}));
            std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(plan.offset_bytes - image_.header_bytes), plan.size_bytes,
                        buffers.back().data());
        }
        std::atomic<std::size_t> left{map.blocks().size()};
        auto work = [&] {
            for (auto i = left.load(); i > 0;) {
                if (!left.compare_exchange_weak(i, i - 1)) continue;
                auto const& plan = map.blocks()[i - 1];
                block const b{buffers[i - 1].data(), plan.size_bytes, memory_kind::host, slots_[buffers[i - 1].region()]};
                if (lent)
                    target.write(plan.offset_bytes, b, answers[i - 1].of(), buffers[i - 1].lend());
                else
                    target.write(plan.offset_bytes, b, answers[i - 1].of());
                i = left.load();
            }
        };
        {
            std::vector<std::jthread> helpers;
            for (unsigned t = 1; t < threads; ++t) helpers.emplace_back(work);
            work();
        }
        for (auto& a : answers) {
            if (!comes([&] { return a.times > 0; })) {
                expect(false, what + ": each write is answered");
                std::terminate();  // the bytes must stay until the answers come: there is no way on
            }
            std::lock_guard lock(a.mutex);
            expect(!a.error, what + ": writes succeed, but: " + a.error.message());
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        expect(std::all_of(answers.begin(), answers.end(), [](auto const& a) { return a.times == 1; }),
               what + ": each write is answered exactly once");
    }

    void hand_over(S& s, target_type& target, answer& safe, answer& durable) {
        std::vector<std::uint64_t> digests(s.takes_digests() ? varve::detail::chunk_count(bytes_.size()) : 0);
        if (!digests.empty()) varve::detail::chunk_digests(bytes_, digests);
        commit_values values{step_, 0, {{"law", "kept"}}};
        target.hand_over(values, digests, safe.of(), durable.of());
        // What it was given is copied.
        std::fill(digests.begin(), digests.end(), 0);
        values.metadata.clear();
    }

    void expect_whole(S& s, target_type& target, std::string const& what) {
        std::atomic<int> count{0};
        answer safe, durable;
        safe.count = durable.count = &count;
        hand_over(s, target, safe, durable);
        expect(comes([&] { return durable.times > 0; }), what + ": it becomes durable or fails");
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        expect(safe.times == 1 && durable.times == 1, what + ": crash_safe and durable are told exactly once each");
        expect(safe.place == 1, what + ": crash_safe is told first");
        for (auto* a : {&safe, &durable}) {
            std::lock_guard lock(a->mutex);
            expect(!a->error, what + ": it succeeds, but: " + a->error.message());
        }
        auto const kept = fixture_.read_back(step_);
        if (!kept) return;
        expect(kept->size() == image_.size_bytes &&
                   std::equal(bytes_.begin(), bytes_.end(), kept->begin() + static_cast<std::ptrdiff_t>(image_.header_bytes)),
               what + ": the receiver has its bytes");
    }

    void whole(S& s, unsigned threads, bool lent) {
        auto const what = std::string(lent ? "lent" : "written") + " by " + std::to_string(threads);
        auto target = open(s);
        write_all(target, threads, lent, what);
        expect_whole(s, target, what);
    }

    void moved_while_open() {
        auto first = introduced();
        S s(std::move(first));
        auto opened = open(s);
        target_type target(std::move(opened));
        write_all(target, 1, true, "moved");
        auto other = open(s);
        --step_;
        other = std::move(target);
        expect_whole(s, other, "moved");
    }

    /// Destroyed before it was handed over, with blocks and without.
    void unwanted() {
        auto s = introduced();
        {
            [[maybe_unused]] auto target = open(s);
        }
        {
            auto target = open(s);
            write_all(target, 1, true, "unwanted");
        }
        whole(s, 1, true);
    }

    /// Destroyed right after it was handed over: its contexts may be gone.
    void not_waited_for() {
        auto s = introduced();
        for (int i = 0; i < 10; ++i) {
            answer safe, durable;
            {
                auto target = open(s);
                write_all(target, 1, true, "not waited for");
                hand_over(s, target, safe, durable);
            }
            int const before = safe.times * 10 + durable.times;
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
            expect(safe.times * 10 + durable.times == before, "not waited for: nothing is told once the target is gone");
        }
        whole(s, 1, true);
    }

    /// With the sink go all loans: every block of the pool can be had again.
    void loans_end() {
        {
            auto s = introduced();
            whole(s, 1, true);
        }
        std::vector<varve::detail::block_pool::buffer> all;
        std::stop_source late;
        std::jthread impatient([&](std::stop_token stop) {
            for (auto const until = std::chrono::steady_clock::now() + fixture_.patience;
                 !stop.stop_requested() && std::chrono::steady_clock::now() < until;)
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
            late.request_stop();
        });
        for (std::size_t i = 0; i < blocks; ++i) all.push_back(varve::detail::block_pool::acquire(pool_, late.get_token()));
        impatient.request_stop();
        expect(std::all_of(all.begin(), all.end(), [](auto const& b) { return static_cast<bool>(b); }),
               "loans: they end with the sink at the latest");
    }

    relaying_fixture<S> const& fixture_;
    std::vector<std::byte> bytes_;
    std::shared_ptr<varve::detail::block_pool> pool_;
    safetensors format_;
    state state_;
    image image_;
    std::vector<int> slots_;
    std::uint64_t step_ = 0;
    std::uint32_t seed_ = 1;
    std::vector<std::string> broken_;
};

}  // namespace detail

/// The laws of a relaying sink (see concepts/relaying_sink.hpp) that can be seen from outside: returns those that the sink
/// breaks, in words, none when it keeps them. Needs relaying_laws::blocks blocks of block_unit_bytes of memory. Ends the
/// program if a write is never answered.
template <relaying_sink S>
std::vector<std::string> check_relaying_sink(relaying_fixture<S> const& fixture) {
    return detail::relaying_laws<S>(fixture).run();
}

}  // namespace varve::conformance
