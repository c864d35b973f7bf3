#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>

#include "varve/error.hpp"

namespace varve {

namespace detail {

enum class goal : std::uint8_t { staged, written, crash_safe, durable };

/// What a save and its tickets share: one outcome a goal, each set once. Thread-safe.
class ticket_state {
public:
    explicit ticket_state(std::uint64_t step) noexcept : step_(step) {}

    std::uint64_t step() const noexcept { return step_; }

    void seal() {
        std::lock_guard lock(mutex_);
        sealed_ = true;
    }

    void reach(goal g, std::error_code outcome = {}) {
        {
            std::lock_guard lock(mutex_);
            auto& slot = outcomes_[static_cast<std::size_t>(g)];
            if (slot) return;
            slot = outcome;
        }
        reached_.notify_all();
    }

    /// Ends every goal that is still open.
    void fail(std::error_code outcome) {
        for (goal g : {goal::staged, goal::written, goal::crash_safe, goal::durable}) reach(g, outcome);
    }

    std::optional<std::error_code> outcome(goal g) const {
        std::lock_guard lock(mutex_);
        return outcomes_[static_cast<std::size_t>(g)];
    }

    template <class Deadline>
    std::error_code wait(goal g, std::optional<Deadline> deadline) const {
        std::unique_lock lock(mutex_);
        auto const& slot = outcomes_[static_cast<std::size_t>(g)];
        if (!slot && !sealed_) return errc::not_sealed;
        auto is_set = [&] { return slot.has_value(); };
        if (!deadline)
            reached_.wait(lock, is_set);
        else if (!reached_.wait_until(lock, *deadline, is_set))
            return std::make_error_code(std::errc::timed_out);
        return *slot;
    }

private:
    std::uint64_t const step_;
    mutable std::mutex mutex_;
    mutable std::condition_variable reached_;
    bool sealed_ = false;
    std::array<std::optional<std::error_code>, 4> outcomes_;
};

}  // namespace detail

/// One thing that a save reaches, once. Copyable, thread-safe, valid after the checkpointer is gone.
class milestone_future {
public:
    /// Whether it was reached or can no longer be.
    bool ready() const { return state_->outcome(goal_).has_value(); }

    /// Waits without a limit. Returns nothing on success, errc::not_sealed at once before seal, else why it failed.
    std::error_code wait() const { return state_->wait<std::chrono::steady_clock::time_point>(goal_, std::nullopt); }

    /// As wait, but returns std::errc::timed_out after `timeout`.
    template <class Rep, class Period>
    std::error_code wait_for(std::chrono::duration<Rep, Period> timeout) const {
        // Behind the clock's now a longer one would not fit.
        if (timeout > std::chrono::hours(24 * 365)) return wait();
        return state_->wait(goal_, std::optional(std::chrono::steady_clock::now() + timeout));
    }

    /// The throwing twin of wait: throws varve::error where wait returns an error.
    void get() const { throw_if(wait(), "save of step " + std::to_string(state_->step())); }

private:
    friend class ticket;
    milestone_future(std::shared_ptr<detail::ticket_state> state, detail::goal g) : state_(std::move(state)), goal_(g) {}

    std::shared_ptr<detail::ticket_state> state_;
    detail::goal goal_;
};

/// What a save returns. Copyable, thread-safe; outlives the checkpointer.
///
/// A save that was not taken is one whose milestones all say errc::skipped; one that had to give way, errc::replaced.
class ticket {
public:
    explicit ticket(std::shared_ptr<detail::ticket_state> state) : state_(std::move(state)) {}

    /// The count of updates that the saved state stands for.
    std::uint64_t step() const noexcept { return state_->step(); }

    /// Training may change the tensors.
    milestone_future staged() const { return {state_, detail::goal::staged}; }
    /// Every byte was handed to the operating system; a crash of the machine may still take it back.
    milestone_future written() const { return {state_, detail::goal::written}; }
    /// The trainer may die: whoever has the checkpoint now will commit it. With a relaying sink that is before durable, and
    /// a newer save may still replace it; with any other when the checkpoint has its name, which is durable but for a method that never is.
    milestone_future crash_safe() const { return {state_, detail::goal::crash_safe}; }
    /// A power cut cannot take it back. A method that is not durable answers errc::unsupported.
    milestone_future durable() const { return {state_, detail::goal::durable}; }

    /// False for a save that was skipped.
    bool taken() const { return state_->outcome(detail::goal::staged) != std::optional<std::error_code>(errc::skipped); }

private:
    std::shared_ptr<detail::ticket_state> state_;
};

}  // namespace varve
