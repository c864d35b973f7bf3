#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "varve/concepts/sink.hpp"
#include "varve/detail/file_request.hpp"
#include "varve/detail/open_file.hpp"
#include "varve/error.hpp"
#include "varve/gds/cufile.hpp"
#include "varve/gds/writer_pool.hpp"
#include "varve/system.hpp"

namespace varve::gds {

struct sink_options {
    unsigned writer_threads = 8;            ///< calls of cuFile at once
    bool direct = true;                     ///< O_DIRECT where the file system gives it; cuFile needs it
    std::size_t block_bytes = 32u << 20;    ///< what limits() calls best
    std::size_t stripe_bytes = 4u << 20;    ///< the least that is worth a thread of its own; a multiple of 4,096
    std::shared_ptr<cufile> gpu = nullptr;  ///< empty: cufile::library()
    system_calls* calls = &system_calls::kernel();
};

/// Writes files from GPU memory through cuFile, with a few threads, which all targets share; a block is split among them.
///
/// Where nvidia-fs is loaded and the file system takes part, the disk reads the GPU's memory; elsewhere cuFile copies through
/// host memory of its own (compatibility mode): describe() says which. What is in host memory (a header) is written from
/// there, and an image's tail that is shorter than the alignment is copied to host memory and written buffered. A file that
/// cuFile does not take is written through host memory, and describe() says why. Completions run on the sink's threads.
/// Thread-safe but for moving and register_memory. Source: cuFile API Reference; open(2) "O_DIRECT".
///
///     if (!varve::gds::sink::available()) {
///         varve::gds::sink files({.writer_threads = 8});
///         auto target = files.open({folder, "image", size_bytes});
///     }
class sink {
public:
    static constexpr bool writes_files = true;

    class target_type {
    public:
        target_type(target_type&& other) noexcept
            : file_(std::move(other.file_)), pool_(std::exchange(other.pool_, nullptr)), known_(std::exchange(other.known_, nullptr)) {}
        target_type& operator=(target_type&& other) noexcept {
            if (this == &other) return *this;
            forget();
            file_ = std::move(other.file_);
            pool_ = std::exchange(other.pool_, nullptr);
            known_ = std::exchange(other.known_, nullptr);
            return *this;
        }
        ~target_type() { forget(); }

        /// See target. Ranges that are not aligned are written all the same, through host memory. Errors are the system's, or
        /// of gds::category() or cuda::category().
        void write(std::uint64_t offset_bytes, block const& b, completion c) noexcept {
            // A transfer that reads is the only one that writes through this pointer.
            submit(varve::detail::transfer::write, offset_bytes, const_cast<std::byte*>(b.data), b.size_bytes, b.memory, b.slot, c);
        }

        /// Reads bytes that were written; std::errc::io_error when the file ends before.
        void read(std::uint64_t offset_bytes, std::span<std::byte> out, completion c) noexcept {
            submit(varve::detail::transfer::read, offset_bytes, out.data(), out.size(), memory_kind::host, unregistered, c);
        }
        /// The same into memory of any kind; `slot` is what register_memory returned for its region.
        void read(std::uint64_t offset_bytes, std::span<std::byte> out, memory_kind memory, int slot, completion c) noexcept {
            submit(varve::detail::transfer::read, offset_bytes, out.data(), out.size(), memory, slot, c);
        }

        /// Makes data and size durable by fdatasync. Once it has failed it fails for ever.
        std::error_code sync() noexcept { return file_.sync(); }

    private:
        friend class sink;
        target_type(varve::detail::open_file file, writer_pool& pool) noexcept : file_(std::move(file)), pool_(&pool) {
            if (file_.direct() < 0) return;
            if (int failure = pool_->gpu().open_file(file_.direct(), known_)) {
                known_ = nullptr;
                pool_->refused(failure);
            }
        }

        void forget() noexcept {
            if (known_) pool_->gpu().close_file(known_);
            known_ = nullptr;
        }
        void submit(varve::detail::transfer way, std::uint64_t offset_bytes, std::byte* data, std::size_t size, memory_kind memory, int slot,
                    completion c) noexcept {
            if (size == 0) return c({});
            pool_->submit({way, file_.direct(), file_.buffered(), data, offset_bytes, size, slot, c, memory, known_});
        }

        varve::detail::open_file file_;
        writer_pool* pool_;
        cufile::file known_ = nullptr;  ///< what cuFile knows the direct descriptor by
    };

    /// Throws error: see cufile::library.
    explicit sink(sink_options options = {}) : options_(std::move(options)) {
        if (!options_.gpu) options_.gpu = cufile::library();
        pool_ = std::make_unique<writer_pool>(options_.writer_threads, options_.stripe_bytes, options_.direct, options_.gpu, *options_.calls);
    }

    /// Whether cuFile starts here: nothing, or why not (no GPU, no library, no driver and no compatibility mode).
    static std::error_code available() noexcept {
        try {
            cufile::library();
        } catch (error const& e) {
            return e.code();
        } catch (std::exception const&) {
            return std::make_error_code(std::errc::not_enough_memory);
        }
        return {};
    }

    /// Tells cuFile of a region of GPU memory, for as long as the sink lives; the caller keeps it that long. Called before
    /// the first write. Returns the slot for blocks of the region, or `unregistered`: describe() then says why.
    int register_memory(std::span<std::byte> region) { return pool_->memory.add(region); }

    /// Throws error with the system's code when the file cannot be opened or sized.
    target_type open(open_request const& r) { return {varve::detail::open_file(r, pool_->mode, *options_.calls), *pool_}; }

    sink_limits limits() const noexcept {
        auto alignment = options_.direct ? varve::detail::direct_alignment : 1;
        return {alignment, alignment, alignment, options_.block_bytes, pool_->threads()};
    }

    static constexpr bool accepts(memory_kind) noexcept { return true; }

    /// One line: nvidia-fs or compatibility mode, direct or buffered, registered or not, and what cuFile refused.
    std::string describe() const {
        return options_.gpu->describe() + ", " + std::to_string(pool_->threads()) + " threads, " + pool_->mode.describe() + ", " +
               pool_->memory.describe() + pool_->refusal();
    }

private:
    sink_options options_;
    std::unique_ptr<writer_pool> pool_;
};

static_assert(varve::sink<sink> && file_sink<sink> && registering_sink<sink> && reading_sink<sink> && device_sink<sink>);

}  // namespace varve::gds
