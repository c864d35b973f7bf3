#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <system_error>
#include <utility>

#include "varve/concepts/sink.hpp"
#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"

namespace varve::detail {

/// The target of a sink that writes files: the file, and the engine that all targets of the sink share.
/// `Engine::submit(file_transfer const&)` is noexcept, thread-safe, and calls the completion once.
template <class Engine>
class file_target {
public:
    file_target(open_file file, Engine& engine) noexcept : file_(std::move(file)), engine_(&engine) {}
    file_target(file_target&&) noexcept = default;
    file_target& operator=(file_target&&) noexcept = default;

    /// See target. Ranges that are not aligned are written all the same, buffered. Errors are the system's.
    void write(std::uint64_t offset_bytes, block const& b, completion c) noexcept {
        // The engine does not write through this pointer: a transfer that reads is the only one that does.
        submit(transfer::write, offset_bytes, const_cast<std::byte*>(b.data), b.size_bytes, b.slot, c);
    }

    /// Reads bytes that were written; std::errc::io_error when the file ends before.
    void read(std::uint64_t offset_bytes, std::span<std::byte> out, completion c) noexcept {
        submit(transfer::read, offset_bytes, out.data(), out.size(), unregistered, c);
    }

    /// Makes data and size durable by fdatasync. Once it has failed it fails for ever.
    std::error_code sync() noexcept { return file_.sync(); }

private:
    void submit(transfer way, std::uint64_t offset_bytes, std::byte* data, std::size_t size, int slot, completion c) noexcept {
        if (size == 0) return c({});
        engine_->submit({way, file_.direct(), file_.buffered(), data, offset_bytes, size, slot, c});
    }

    open_file file_;
    Engine* engine_;
};

}  // namespace varve::detail
