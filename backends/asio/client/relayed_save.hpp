#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <system_error>

#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/loan.hpp"

namespace varve::asio::client {

class session;

/// One save on its way to the monitor, between the checkpointer's target and the connection. Thread-safe.
class relayed_save {
public:
    /// `lost`: told when it fails before hand_over.
    relayed_save(std::shared_ptr<session> s, std::uint64_t id, completion lost) noexcept : session_(std::move(s)), id_(id), on_lost_(lost) {}
    relayed_save(relayed_save const&) = delete;
    relayed_save& operator=(relayed_save const&) = delete;

    void write(std::uint64_t offset_bytes, block const& b, completion done, loan kept) noexcept;
    void hand_over(commit_values const& values, std::span<std::uint64_t const> chunk_digests, completion crash_safe, completion durable) noexcept;
    /// Nobody waits any more; no completion is called once this has returned.
    void detach() noexcept;

    /// What the monitor says of it. An error is the last word.
    void crash_safe() noexcept;
    void durable() noexcept;
    void failed(std::error_code why) noexcept;

private:
    std::shared_ptr<session> const session_;
    std::uint64_t const id_;
    completion const on_lost_;
    std::mutex mutex_;  ///< held while a completion runs, but for those of writes
    bool handed_ = false, safe_ = false, over_ = false;
    std::error_code error_;
    completion on_safe_, on_durable_;
};

}  // namespace varve::asio::client
