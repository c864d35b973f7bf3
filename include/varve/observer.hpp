#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace varve {

/// What happens to a save, in about this order. `skipped`, `replaced` and `failed` end it early. `crash_safe` comes from
/// relaying sinks alone: elsewhere it would come with `durable`.
enum class milestone : std::uint8_t {
    begin,
    layer_ready,
    layer_copied,
    write,
    staged,
    written,
    crash_safe,
    durable,
    failed,
    skipped,
    replaced,
    restored
};

inline constexpr std::size_t milestone_count = 12;

/// The name that the events file gives the milestone.
constexpr std::string_view name(milestone m) noexcept {
    constexpr std::array<std::string_view, milestone_count> names{"begin",      "layer_ready", "layer_copied", "write",   "staged",   "written",
                                                                  "crash_safe", "durable",     "failed",       "skipped", "replaced", "restored"};
    return names[static_cast<std::size_t>(m)];
}

/// One milestone of one save. `layer` is set where one layer is meant and is valid during the call only.
struct event {
    milestone what = milestone::begin;
    std::uint64_t step = 0;
    std::int64_t time_ns = 0;  ///< Unix time
    std::uint64_t bytes = 0;   ///< of the layer, the write or the checkpoint; 0 where it does not apply
    std::string_view layer{};
    std::error_code error{};
};

/// O satisfies `observer`, what sees every milestone, if `on(event)` is noexcept. It is called on any thread, from
/// several at once, with no lock held; it should be quick, since the save waits for it.
template <class O>
concept observer = requires(O& o, event const& e) {
    { o.on(e) } noexcept;
};

/// Observers by reference; they outlive the checkpointer that was given the list.
class observer_list {
public:
    template <observer O>
    void add(O& o) {
        entries_.push_back({&o, [](void* who, event const& e) noexcept { static_cast<O*>(who)->on(e); }});
    }

    bool empty() const noexcept { return entries_.empty(); }
    /// The time of events that are told one after the other; 0 where nobody listens.
    std::int64_t now_ns() const noexcept {
        if (entries_.empty()) return 0;
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    }

    /// One without a time happens now.
    void on(event e) const noexcept {
        if (entries_.empty()) return;
        if (e.time_ns == 0) e.time_ns = now_ns();
        for (auto const& entry : entries_) entry.call(entry.who, e);
    }

private:
    struct entry {
        void* who;
        void (*call)(void*, event const&) noexcept;
    };
    std::vector<entry> entries_;
};

/// Counts events and their bytes, a milestone each. Thread-safe.
class counters {
public:
    void on(event const& e) noexcept {
        auto i = static_cast<std::size_t>(e.what);
        counts_[i].fetch_add(1, std::memory_order_relaxed);
        bytes_[i].fetch_add(e.bytes, std::memory_order_relaxed);
    }
    std::uint64_t count(milestone m) const noexcept { return counts_[static_cast<std::size_t>(m)].load(std::memory_order_relaxed); }
    std::uint64_t bytes(milestone m) const noexcept { return bytes_[static_cast<std::size_t>(m)].load(std::memory_order_relaxed); }

private:
    std::array<std::atomic<std::uint64_t>, milestone_count> counts_{};
    std::array<std::atomic<std::uint64_t>, milestone_count> bytes_{};
};

static_assert(observer<counters> && observer<observer_list>);

}  // namespace varve
