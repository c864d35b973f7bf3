#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/detail/piece_threads.hpp"
#include "varve/gds/cufile.hpp"
#include "varve/gds/error.hpp"
#include "varve/gds/registered_memory.hpp"
#include "varve/system.hpp"

namespace varve::gds {

/// The threads that carry out the transfers of all targets of a sink. Thread-safe.
///
/// Bytes in GPU memory go through cuFile where they are aligned and cuFile takes the file; otherwise, and an image's tail
/// always, through a page-locked piece of the thread's own. Bytes in host memory are written as they are.
class writer_pool {
public:
    /// Throws std::system_error when a thread cannot be started.
    writer_pool(unsigned threads, std::size_t stripe_bytes, bool direct, std::shared_ptr<cufile> gpu, system_calls& calls)
        : mode(direct), memory(gpu), gpu_(std::move(gpu)), calls_(calls),
          threads_(
              threads, stripe_bytes,
              [this] {
                  gpu_->enter_thread();
                  return [this, bounce = std::shared_ptr<std::byte>()](piece_type& p) mutable noexcept { return carry_out(p, bounce); };
              },
              &code_of) {}

    /// Nothing may be in flight.
    ~writer_pool() = default;
    writer_pool(writer_pool const&) = delete;
    writer_pool& operator=(writer_pool const&) = delete;

    std::size_t threads() const noexcept { return threads_.size(); }
    cufile& gpu() noexcept { return *gpu_; }

    /// cuFile does not take a file, or a transfer; the first reason stays.
    void refused(int failure) noexcept {
        int none = 0;
        refusal_.compare_exchange_strong(none, failure);
    }
    /// Empty where it was never refused.
    std::string refusal() const {
        auto const failure = refusal_.load();
        return failure == 0 ? std::string() : ", through host memory since cuFile refuses (" + code_of(failure).message() + ")";
    }

    void submit(varve::detail::file_transfer const& what) noexcept { threads_.submit(what); }

    varve::detail::seen_write_mode mode;
    registered_memory memory;

private:
    static constexpr std::size_t bounce_bytes = 1u << 20;

    using piece_type = varve::detail::file_piece;

    /// One system call or one call of cuFile: bytes, or a negative failure.
    std::int64_t transfer_host(piece_type const& p, std::byte* data, std::size_t size) noexcept {
        auto n = p.request->what.way == varve::detail::transfer::write ? calls_.pwrite(p.fd(), data, size, p.offset())
                                                                       : calls_.pread(p.fd(), data, size, p.offset());
        return n < 0 ? -errno : n;
    }
    std::int64_t transfer_gpu(piece_type const& p) noexcept {
        auto const& what = p.request->what;
        auto* base = memory.base_of(what.slot, what.data, what.size_bytes);
        auto const at = static_cast<std::size_t>(p.data() - base);
        auto const offset = static_cast<std::uint64_t>(p.offset());
        return what.way == varve::detail::transfer::write ? gpu_->write(what.file, base, at, p.size(), offset)
                                                          : gpu_->read(what.file, base, at, p.size(), offset);
    }
    std::int64_t transfer_through(piece_type const& p, std::shared_ptr<std::byte>& bounce) noexcept {
        try {
            if (!bounce) bounce = gpu_->host_memory(bounce_bytes);
        } catch (std::exception const&) {
            return -ENOMEM;
        }
        auto const size = std::min(p.size(), bounce_bytes);
        if (p.request->what.way == varve::detail::transfer::read) {
            auto n = transfer_host(p, bounce.get(), size);
            if (n <= 0) return n;
            auto failure = gpu_->copy(p.data(), bounce.get(), static_cast<std::size_t>(n));
            return failure == 0 ? n : -failure;
        }
        auto failure = gpu_->copy(bounce.get(), p.data(), size);
        return failure == 0 ? transfer_host(p, bounce.get(), size) : -failure;
    }

    int carry_out(piece_type& p, std::shared_ptr<std::byte>& bounce) noexcept {
        bool const on_gpu = p.request->what.memory == memory_kind::device;
        bool through_cufile = on_gpu && p.request->what.file != nullptr;
        int error = 0;
        while (error == 0 && !p.over()) {
            if (through_cufile && p.direct) {
                auto n = transfer_gpu(p);
                if (n <= -detail::first_of_cufile && n > -detail::first_of_cuda) {
                    // No fault of the disk's: cuFile has no way for this. The bytes have one.
                    refused(static_cast<int>(-n));
                    through_cufile = false;
                    continue;
                }
                error = p.take(n, mode);
            } else {
                error = p.take(on_gpu ? transfer_through(p, bounce) : transfer_host(p, p.data(), p.size()), mode);
            }
        }
        return error;
    }

    std::shared_ptr<cufile> gpu_;
    system_calls& calls_;
    std::atomic<int> refusal_{0};
    varve::detail::piece_threads threads_;  ///< the last: they use what stands above
};

}  // namespace varve::gds
