#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <thread>

#include "dialogue.hpp"
#include "session.hpp"
#include "varve/asio/monitor_sink.hpp"

namespace varve::asio::client {

/// What a monitor_sink has: the run, and a connection that is made anew when it was lost. Thread-safe.
class relay {
public:
    /// Gives the file that an image's bytes are received into; one that is not open means that they are not wanted.
    using receiver = std::function<file_descriptor(wire::image const& about)>;

    /// `for_monitor`: what it brings and asks for is not passed on by the one that it talks to.
    relay(address where, std::string store, monitor_sink_options options, bool for_monitor = false);
    ~relay();

    int register_memory(std::span<std::byte> region);
    void introduce(relayed_run const& run);
    bool by_reference() const noexcept { return by_reference_; }
    /// `lost`: as in open_request.
    std::shared_ptr<relayed_save> open(std::uint64_t step, completion lost = {});
    void set_draining(bool on) noexcept;
    /// Over TCP the bytes go to memory of their own, or where `into` says.
    std::optional<fetched_checkpoint> fetch(std::optional<std::uint64_t> step, std::uint32_t skip, receiver const& into = in_memory);
    std::string describe() const;

    /// The current connection, made anew if it is lost. Throws errc::monitor_lost.
    std::shared_ptr<session> connected();
    /// Ends whatever waits here, the connection too, after a goodbye that gets so long; nothing is begun any more.
    void cancel(std::chrono::milliseconds goodbye = {}) noexcept;

private:
    /// A connection, and where there is none, one to the monitor that `respawn` starts. Throws errc::monitor_lost.
    std::unique_ptr<dialogue> reach();
    std::unique_ptr<dialogue> try_to_reach();
    /// Says hello and makes the connection the current one. Throws what the monitor refuses with.
    wire::welcome welcome(dialogue& open, deadline at_most) const;
    std::shared_ptr<session> greet(std::unique_ptr<dialogue> open);
    std::shared_ptr<session> greet_first();
    void install(std::shared_ptr<session> s);
    void put_off(std::chrono::steady_clock::time_point start_of_the_last);
    void run(std::stop_token stop);
    void settle(session& ended, session::loans loans) noexcept;
    bool try_to_settle(session& ended) noexcept;
    std::shared_ptr<session> greet_again(std::unique_ptr<dialogue> open, session const& last);
    void receive_image(dialogue& from, wire::image const& about, int into);
    static file_descriptor in_memory(wire::image const& about);

    address const where_;
    std::string const store_;
    monitor_sink_options const options_;
    bool const for_monitor_;
    bool by_reference_ = false;

    std::atomic<bool> ending_{false};
    std::timed_mutex connecting_;  ///< held by whoever connects; guards the two lines below
    wire::hello hello_;
    std::chrono::steady_clock::time_point not_before_{};

    mutable std::mutex mutex_;
    std::condition_variable_any changed_;
    std::shared_ptr<session> current_;
    bool draining_ = false;
    session const* settled_ = nullptr;  ///< the last one whose loans have all ended, or are kept for good
    std::mutex beginning_;
    std::uint64_t next_save_ = 0;
    std::jthread runner_;
};

}  // namespace varve::asio::client
