#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "varve/detail/gather.hpp"
#include "varve/error.hpp"
#include "varve/state.hpp"

namespace varve {

/// The way to tensors that the CPU cannot reach; a backend provides it. Every function may be called on any thread, and
/// throws error with the device's code.
class device_memory {
public:
    virtual ~device_memory() = default;

    /// The most that one piece of memory holds.
    static constexpr std::size_t piece_bytes = (4u << 20) + 8192;

    /// A piece of host memory that the device reads at full speed, aligned to 4,096 bytes; waits until one is free.
    virtual std::span<std::byte> borrow() = 0;
    /// Brings bytes of a borrowed piece to [offset, offset + size) of the tensor's row-major form. The bytes stay as they
    /// are until the piece is given back, which may be at once.
    virtual void write(tensor const& to, std::uint64_t offset_bytes, std::span<std::byte const> bytes) = 0;
    /// Lets a piece go; it is lent again once what was written from it has arrived.
    virtual void give_back(std::span<std::byte> piece) noexcept = 0;
    /// Returns when everything that was written has arrived.
    virtual void finish() = 0;

    /// Hands out the bytes of tensors in their row-major form, in order; one thread's. It keeps up to three pieces of memory, as
    /// long as it lives: whoever borrows meanwhile, on the same thread, may wait for ever.
    class reader {
    public:
        virtual ~reader() = default;
        /// The next bytes, all of one tensor, which stay until the next call; none where all were handed out. Throws error,
        /// and has no more then.
        virtual std::span<std::byte const> next() = 0;
    };
    /// Reads the tensors one after the other, ahead of what is asked for. The tensors do not change meanwhile, and outlive the
    /// reader, as this does.
    virtual std::unique_ptr<reader> read(std::vector<tensor const*> from) = 0;
};

namespace detail {

/// Throws errc::unsupported for a tensor in GPU memory where there is no way there.
inline void expect_reachable(tensor const& t, device_memory const* device, char const* what) {
    if (t.memory == memory_kind::device && !device) throw error(errc::unsupported, std::string(what) + t.name + ": it lies in GPU memory");
}

/// `bytes` to the tensor, wherever it lies; for one in GPU memory they lie in a borrowed piece.
inline void put(tensor const& t, std::uint64_t offset_bytes, std::span<std::byte const> bytes, device_memory* device) {
    if (t.memory == memory_kind::device)
        device->write(t, offset_bytes, bytes);
    else
        scatter(t, offset_bytes, bytes.size(), bytes.data());
}

}  // namespace detail
}  // namespace varve
