#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/detail/aligned_bytes.hpp"

namespace varve::conformance {

/// How a sink's laws are looked at.
template <sink S>
struct sink_fixture {
    /// A sink to break in; called several times.
    std::function<S()> make;
    /// A request for image `index` (0 or 1: two files, or the same nothing) of that size; 0 is an image of unknown size.
    std::function<open_request(int index, std::uint64_t size_bytes)> request;
    /// What is on storage for image `index` after a sync, by other means than the sink's; nothing where nothing is kept.
    std::function<std::optional<std::vector<std::byte>>(S& sink, int index)> read_back;
    /// Whether images of unknown size may be written, in order, in pieces of any length.
    bool streams = true;
    /// How long a completion may take.
    std::chrono::seconds patience{60};
};

namespace detail {

/// Counts the completions of a number of writes.
class answers {
public:
    explicit answers(std::size_t count) : calls_(count) {
        for (std::size_t i = 0; i < count; ++i) contexts_.push_back({this, i});
    }

    completion of(std::size_t i) noexcept {
        return {[](void* context, std::error_code error) noexcept {
                    auto& c = *static_cast<entry*>(context);
                    std::lock_guard lock(c.all->mutex_);
                    ++c.all->calls_[c.index];
                    if (error) c.all->error_ = error;
                    ++c.all->came_;
                    c.all->changed_.notify_all();
                },
                &contexts_[i]};
    }

    /// True when each has come; one that comes twice shows in `exactly_once` a little later.
    bool wait(std::chrono::seconds patience) {
        std::unique_lock lock(mutex_);
        return changed_.wait_for(lock, patience, [&] { return came_ >= calls_.size(); });
    }
    bool exactly_once() {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        std::lock_guard lock(mutex_);
        return std::all_of(calls_.begin(), calls_.end(), [](int n) { return n == 1; });
    }
    std::error_code error() {
        std::lock_guard lock(mutex_);
        return error_;
    }

private:
    struct entry {
        answers* all;
        std::size_t index;
    };
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<int> calls_;
    std::vector<entry> contexts_;
    std::size_t came_ = 0;
    std::error_code error_;
};

/// Runs the laws one after the other and lists what is broken.
template <sink S>
class sink_laws {
public:
    explicit sink_laws(sink_fixture<S> const& fixture) : fixture_(fixture) {}

    std::vector<std::string> run() {
        publishes();
        for (std::uint64_t blocks : {1, 5})
            for (std::uint64_t tail : {0u, 1u, 4095u, 4097u, 100'000u}) whole_image(blocks * block_bytes + tail, 4);
        whole_image(1, 1);
        whole_image(4096, 1);
        rewritten_shorter_and_longer();
        moved_while_open();
        two_at_once();
        reopened_without_sync();
        nothing_written();
        if (fixture_.streams) streamed();
        if constexpr (reading_sink<S>) read_by_target();
        if constexpr (registering_sink<S>) from_registered_memory();
        return std::move(broken_);
    }

private:
    static constexpr std::size_t block_bytes = 1u << 20;
    using target_type = typename S::target_type;

    void expect(bool holds, std::string const& law) {
        if (!holds) broken_.push_back(law);
    }

    static varve::detail::aligned_bytes pattern(std::size_t size, unsigned seed) {
        varve::detail::aligned_bytes bytes(size);
        std::uint64_t x = 0x9e3779b97f4a7c15u * (seed + 1);
        for (auto& b : bytes.bytes()) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            b = static_cast<std::byte>(x >> 56);
        }
        return bytes;
    }

    /// Writes the bytes in blocks from `threads` threads, the last block first, and syncs.
    void write_all(target_type& target, std::span<std::byte const> bytes, unsigned threads, int slot, std::string const& what) {
        std::size_t count = (bytes.size() + block_bytes - 1) / block_bytes;
        answers came(count);
        std::atomic<std::size_t> left{count};
        auto work = [&] {
            for (auto i = left.load(); i > 0;) {
                if (!left.compare_exchange_weak(i, i - 1)) continue;
                auto part = bytes.subspan((i - 1) * block_bytes, std::min(block_bytes, bytes.size() - (i - 1) * block_bytes));
                target.write((i - 1) * block_bytes, {part.data(), part.size(), memory_kind::host, slot}, came.of(i - 1));
                i = left.load();
            }
        };
        {
            std::vector<std::jthread> helpers;
            for (unsigned t = 1; t < threads; ++t) helpers.emplace_back(work);
            work();
        }
        if (!came.wait(fixture_.patience)) {
            expect(false, what + ": each write is answered");
            std::terminate();  // the bytes must stay until the answers come: there is no way on
        }
        expect(came.exactly_once(), what + ": each write is answered exactly once");
        expect(!came.error(), what + ": writes succeed, but: " + came.error().message());
        auto synced = target.sync();
        expect(!synced, what + ": sync succeeds, but: " + synced.message());
    }

    void expect_kept(S& s, int index, std::span<std::byte const> bytes, std::string const& what) {
        auto kept = fixture_.read_back(s, index);
        if (!kept) return;
        expect(kept->size() == bytes.size(), what + ": the image has its size, but: " + std::to_string(kept->size()));
        expect(std::equal(kept->begin(), kept->end(), bytes.begin(), bytes.end()), what + ": the image has its bytes");
    }

    void publishes() {
        auto s = fixture_.make();
        auto before = s.limits();
        for (auto a : {before.memory_alignment, before.offset_alignment, before.length_alignment})
            expect(std::has_single_bit(a), "limits: alignments are powers of two");
        expect(before.best_block_bytes > 0 && before.best_block_bytes % before.offset_alignment == 0 &&
                   before.best_block_bytes % before.length_alignment == 0,
               "limits: the best block is a multiple of the alignments");
        expect(before.queue_depth >= 1, "limits: the queue depth is at least 1");
        expect(S::accepts(memory_kind::host) || S::accepts(memory_kind::pinned) || S::accepts(memory_kind::device), "accepts: some memory");
        auto one_line = [&] { return !s.describe().empty() && s.describe().find('\n') == std::string::npos; };
        expect(one_line(), "describe: one line before the first open");
        {
            [[maybe_unused]] auto target = s.open(fixture_.request(0, block_bytes));
        }
        auto after = s.limits();
        expect(after.memory_alignment == before.memory_alignment && after.offset_alignment == before.offset_alignment &&
                   after.length_alignment == before.length_alignment && after.best_block_bytes == before.best_block_bytes &&
                   after.queue_depth == before.queue_depth,
               "limits: the same at every call");
        expect(one_line(), "describe: one line after an open");
    }

    void whole_image(std::uint64_t size, unsigned threads) {
        auto what = "image of " + std::to_string(size) + " bytes";
        auto bytes = pattern(size, static_cast<unsigned>(size));
        auto s = fixture_.make();
        {
            auto target = s.open(fixture_.request(0, size));
            write_all(target, bytes.bytes(), threads, unregistered, what);
            expect(!target.sync(), what + ": a second sync succeeds");
        }
        expect_kept(s, 0, bytes.bytes(), what);
    }

    void rewritten_shorter_and_longer() {
        auto s = fixture_.make();
        unsigned seed = 1;
        for (std::size_t size : {3 * block_bytes, block_bytes + 77, 2 * block_bytes + 5}) {
            auto bytes = pattern(size, seed++);
            auto target = s.open(fixture_.request(0, size));
            write_all(target, bytes.bytes(), 2, unregistered, "rewritten");
            expect_kept(s, 0, bytes.bytes(), "rewritten");
        }
    }

    void moved_while_open() {
        auto bytes = pattern(2 * block_bytes + 9, 5);
        auto first = fixture_.make();
        S s(std::move(first));
        auto opened = s.open(fixture_.request(0, bytes.size()));
        target_type target(std::move(opened));
        auto other = s.open(fixture_.request(1, block_bytes));
        other = std::move(target);
        write_all(other, bytes.bytes(), 1, unregistered, "moved");
        expect_kept(s, 0, bytes.bytes(), "moved");
    }

    void two_at_once() {
        auto a = pattern(4 * block_bytes + 3, 6), b = pattern(4 * block_bytes + 3, 7);
        auto s = fixture_.make();
        auto ta = s.open(fixture_.request(0, a.size()));
        auto tb = s.open(fixture_.request(1, b.size()));
        std::vector<std::string> aside;
        {
            sink_laws second(fixture_);
            std::jthread helper([&] { second.write_all(tb, b.bytes(), 1, unregistered, "two at once"); });
            write_all(ta, a.bytes(), 1, unregistered, "two at once");
            helper.join();
            aside = std::move(second.broken_);
        }
        broken_.insert(broken_.end(), aside.begin(), aside.end());
        // A sink that keeps one image keeps the one that was synced last: sync again, then look.
        expect(!ta.sync(), "two at once: sync succeeds");
        expect_kept(s, 0, a.bytes(), "two at once");
        expect(!tb.sync(), "two at once: sync succeeds");
        expect_kept(s, 1, b.bytes(), "two at once");
    }

    void reopened_without_sync() {
        auto bytes = pattern(block_bytes + 1, 8);
        auto s = fixture_.make();
        for (int i = 0; i < 3; ++i) {
            [[maybe_unused]] auto target = s.open(fixture_.request(0, bytes.size()));
        }
        auto target = s.open(fixture_.request(0, bytes.size()));
        write_all(target, bytes.bytes(), 1, unregistered, "opened again");
        expect_kept(s, 0, bytes.bytes(), "opened again");
    }

    void nothing_written() {
        auto s = fixture_.make();
        auto target = s.open(fixture_.request(0, block_bytes));
        answers came(1);
        std::byte none{};
        target.write(0, {&none, 0, memory_kind::host, unregistered}, came.of(0));
        expect(came.wait(fixture_.patience) && !came.error(), "a write of no bytes is answered");
        expect(!target.sync(), "sync without a write succeeds");
    }

    void streamed() {
        auto bytes = pattern(block_bytes + 12'345, 9);
        auto s = fixture_.make();
        auto target = s.open(fixture_.request(0, 0));
        std::size_t at = 0;
        for (std::size_t length = 1; at < bytes.size(); length = length * 3 + 1) {
            auto n = std::min(length, bytes.size() - at);
            answers came(1);
            target.write(at, {bytes.data() + at, n, memory_kind::host, unregistered}, came.of(0));
            expect(came.wait(fixture_.patience) && !came.error(), "streamed: a piece of any length is taken");
            at += n;
        }
        expect(!target.sync(), "streamed: sync succeeds");
        expect_kept(s, 0, bytes.bytes(), "streamed");
    }

    void read_by_target() {
        auto bytes = pattern(2 * block_bytes + 333, 10);
        auto s = fixture_.make();
        auto target = s.open(fixture_.request(0, bytes.size()));
        write_all(target, bytes.bytes(), 1, unregistered, "read by the target");
        varve::detail::aligned_bytes out(bytes.size());
        answers came(3);
        target.read(block_bytes, out.bytes().subspan(block_bytes), came.of(0));
        target.read(0, out.bytes().first(4096), came.of(1));
        target.read(4096, out.bytes().subspan(4096, block_bytes - 4096), came.of(2));
        expect(came.wait(fixture_.patience) && !came.error() && came.exactly_once(), "read by the target: each read is answered once");
        expect(std::equal(out.bytes().begin(), out.bytes().end(), bytes.bytes().begin()), "read by the target: the bytes that were written");
        answers beyond(1);
        target.read(3 * block_bytes, out.bytes().first(4096), beyond.of(0));
        expect(beyond.wait(fixture_.patience) && beyond.error(), "read by the target: an error beyond the end");
    }

    void from_registered_memory() {
        auto bytes = pattern(3 * block_bytes + 11, 11);
        auto s = fixture_.make();
        auto slot = s.register_memory(bytes.bytes());
        auto target = s.open(fixture_.request(0, bytes.size()));
        write_all(target, bytes.bytes(), 2, slot, "registered memory");
        expect_kept(s, 0, bytes.bytes(), "registered memory");
    }

    sink_fixture<S> const& fixture_;
    std::vector<std::string> broken_;
};

}  // namespace detail

/// The laws of a sink (see sink and target in concepts/sink.hpp) that can be seen from outside: returns those that the
/// sink breaks, in words, none when it keeps them. Writes some 40 MB. Ends the program if a write is never answered.
///
///     auto broken = varve::conformance::check_sink<my_sink>({make, request, read_back});
///     for (auto const& law : broken) std::puts(law.c_str());
template <sink S>
std::vector<std::string> check_sink(sink_fixture<S> const& fixture) {
    return detail::sink_laws<S>(fixture).run();
}

}  // namespace varve::conformance
