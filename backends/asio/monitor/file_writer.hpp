#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <system_error>

#include "varve/concepts/sink.hpp"
#include "varve/system.hpp"

namespace varve::asio::server {

/// A sink and its targets with their types erased; see sink and target for what the members do.
class file_writer {
public:
    class target {
    public:
        virtual ~target() = default;
        virtual void write(std::uint64_t offset_bytes, block const& b, completion c) noexcept = 0;
        virtual std::error_code sync() noexcept = 0;
    };

    virtual ~file_writer() = default;
    virtual int register_memory(std::span<std::byte> region) = 0;
    virtual std::unique_ptr<target> open(open_request const& r) = 0;
    virtual std::size_t queue_depth() const = 0;
    virtual std::string describe() const = 0;
};

/// io_uring where it runs, else POSIX threads; `writes_at_once` 0 is what suits either. Throws what the sinks throw.
std::unique_ptr<file_writer> make_file_writer(unsigned writes_at_once, system_calls& calls);
std::unique_ptr<file_writer> make_posix_writer(unsigned writes_at_once, system_calls& calls);

/// A writer of one type of sink.
template <file_sink Sink>
class writer_of final : public file_writer {
public:
    explicit writer_of(Sink sink) : sink_(std::move(sink)) {}

    int register_memory(std::span<std::byte> region) override {
        if constexpr (registering_sink<Sink>)
            return sink_.register_memory(region);
        else
            return unregistered;
    }
    std::unique_ptr<target> open(open_request const& r) override { return std::make_unique<target_of>(sink_.open(r)); }
    std::size_t queue_depth() const override { return sink_.limits().queue_depth; }
    std::string describe() const override { return sink_.describe(); }

private:
    class target_of final : public target {
    public:
        explicit target_of(typename Sink::target_type t) : target_(std::move(t)) {}
        void write(std::uint64_t offset_bytes, block const& b, completion c) noexcept override { target_.write(offset_bytes, b, c); }
        std::error_code sync() noexcept override { return target_.sync(); }

    private:
        typename Sink::target_type target_;
    };

    Sink sink_;
};

}  // namespace varve::asio::server
