#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "varve/asio/transport.hpp"
#include "varve/system.hpp"

namespace varve::asio {

/// What a monitor reads a region of a trainer's GPU memory with, whether or not the trainer is still there. One thread's.
class device_reader {
public:
    virtual ~device_reader() = default;
    /// Host memory that read() is fast to, aligned to 4,096 bytes. Throws error.
    virtual std::shared_ptr<std::byte> host_memory(std::size_t size_bytes) = 0;
    /// Copies bytes from `offset_bytes` of the region on; they are there when it returns.
    virtual std::error_code read(std::uint64_t offset_bytes, std::span<std::byte> to) noexcept = 0;
};

struct monitor_options {
    /// Where stores stand that are asked for by name; over TCP every one is.
    std::filesystem::path dir;
    /// Where it listens, at least one.
    std::vector<address> listen;
    /// What TCP connections use; without it they are on loopback alone.
    std::shared_ptr<tls_context const> tls;
    /// How long the newest checkpoint stays in memory once its trainer has gone.
    std::chrono::milliseconds linger{60'000};
    /// The most that pools, blocks and lingering checkpoints may take together; a trainer that asks for more is refused.
    std::uint64_t memory_limit_bytes = 0;
    /// Ends by itself once a trainer has come and all have gone, lingering included.
    bool once = false;
    /// Writes from how many threads, or with which queue depth; 0: what suits the machine.
    unsigned writes_at_once = 0;
    /// Threads that serve connections.
    unsigned threads = 2;
    /// A monitor on another host that gets a copy of every store, and is asked for what is not here; without peer_tls it is on
    /// loopback. Its stores have the names of the folders here.
    std::optional<address> peer{};
    std::shared_ptr<tls_context const> peer_tls{};
    std::chrono::milliseconds peer_retry{3'000};      ///< between tries to reach it; or four times what the last took
    std::chrono::milliseconds peer_farewell{60'000};  ///< what stop() gives it to get the newest, where it is there
    std::chrono::milliseconds hello_limit{5'000};     ///< for the first message
    std::chrono::milliseconds ping_every{3'000};      ///< well below the silence_limit of the sinks
    std::chrono::milliseconds silence_limit{15'000};  ///< a peer over TCP that says nothing for so long is gone
    system_calls* calls = &system_calls::kernel();    ///< on the way to disk; replaced in tests
    /// Opens a region of a trainer's GPU memory, by the descriptor that came with it and the GPU's name (see shared_pool::device).
    /// Trainers with such a pool are refused without it. On any thread; throws error.
    std::function<std::unique_ptr<device_reader>(file_descriptor region, std::uint64_t size_bytes, std::string const& device)> device_memory{};
    /// Gets one line for what an operator wants to know; on any thread.
    std::function<void(std::string const&)> log;
};

/// A process's part that owns stores and outlives the trainers that fill them.
///
/// Trainers connect, pass the memory of their staging pools or send blocks as payload, and the monitor writes and commits
/// their checkpoints. What a trainer handed over whole is committed whatever becomes of it; what it did not is discarded.
/// Afterwards the newest checkpoint lingers in memory, for a restart. With a peer, what is committed here is sent there too. The protocol is in
/// wire.hpp and in the README.
///
///     varve::asio::monitor m({.dir = "checkpoints", .listen = {varve::asio::parse_address("unix:/run/varve")}, .memory_limit_bytes = 4u << 30});
///     m.run();  // until stop()
class monitor {
public:
    /// Listens from here on. Throws error: what listener throws.
    explicit monitor(monitor_options options);
    ~monitor();
    monitor(monitor const&) = delete;
    monitor& operator=(monitor const&) = delete;

    /// Serves until stop(), or with `once` until nothing is left to do; returns when everything crash-safe is committed.
    void run();
    /// Takes no more from anybody, finishes what is crash-safe, and lets run() return. Thread-safe, at any time.
    void stop() noexcept;
    /// Where it listens, with the ports that the kernel chose.
    std::vector<address> where() const;
    /// What a STATUS message gets, as JSON; the keys are in the README. Thread-safe.
    std::string status() const;

private:
    class impl;
    std::shared_ptr<impl> impl_;
};

}  // namespace varve::asio
