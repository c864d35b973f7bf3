#include "relayed_save.hpp"

#include <exception>

#include "session.hpp"
#include "varve/error.hpp"

namespace varve::asio::client {

void relayed_save::write(std::uint64_t offset_bytes, block const& b, completion done, loan kept) noexcept {
    std::error_code failed;
    {
        std::lock_guard lock(mutex_);
        failed = error_;
    }
    if (failed) return done(failed);
    session_->write(id_, offset_bytes, b, done, std::move(kept));
}

void relayed_save::hand_over(commit_values const& values, std::span<std::uint64_t const> chunk_digests, completion crash_safe,
                             completion durable) noexcept {
    {
        std::lock_guard lock(mutex_);
        on_safe_ = crash_safe;
        on_durable_ = durable;
        handed_ = true;
        if (over_) {
            on_safe_(error_);
            on_durable_(error_);
            return;
        }
    }
    std::error_code why = errc::monitor_lost;
    try {
        if (session_->commit(id_, values, chunk_digests)) return;
    } catch (error const& e) {
        why = e.code();
        session_->abandon(id_);
    } catch (std::exception const&) {
        why = std::make_error_code(std::errc::not_enough_memory);
        session_->abandon(id_);
    }
    failed(why);
}

void relayed_save::detach() noexcept {
    bool unwanted = false;
    {
        std::lock_guard lock(mutex_);
        unwanted = !handed_ && !over_;
        over_ = true;
        handed_ = false;
    }
    session_->forget(id_);
    if (unwanted) session_->abandon(id_);
}

void relayed_save::crash_safe() noexcept {
    std::lock_guard lock(mutex_);
    if (over_ || safe_ || !handed_) return;
    safe_ = true;
    on_safe_({});
}

void relayed_save::durable() noexcept {
    std::lock_guard lock(mutex_);
    if (over_ || !handed_) return;
    over_ = true;
    if (!safe_) on_safe_({});
    on_durable_({});
}

void relayed_save::failed(std::error_code why) noexcept {
    std::lock_guard lock(mutex_);
    if (over_) return;
    over_ = true;
    error_ = why;
    if (!handed_) {
        if (on_lost_.done) on_lost_(why);
        return;
    }
    if (!safe_) on_safe_(why);
    on_durable_(why);
}

}  // namespace varve::asio::client
