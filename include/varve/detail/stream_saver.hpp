#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <semaphore>
#include <span>
#include <system_error>
#include <utility>

#include "varve/checkpointer_options.hpp"
#include "varve/concepts/format.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"
#include "varve/ticket.hpp"

namespace varve::detail {

/// Hands a stream's bytes to a target, one write at a time: the bytes are the caller's, nothing is copied.
template <target Target>
class target_stream final : public byte_stream {
public:
    explicit target_stream(Target& to) : to_(to) {}

    void write(std::span<std::byte const> bytes) override {
        if (bytes.empty()) return;
        to_.write(written_, {bytes.data(), bytes.size(), memory_kind::host, unregistered},
                  {[](void* context, std::error_code ec) noexcept {
                       auto& self = *static_cast<target_stream*>(context);
                       self.error_ = ec;
                       self.came_.release();
                   },
                   this});
        came_.acquire();
        if (error_) throw error(error_, "cannot write the checkpoint: " + error_.message());
        written_ += bytes.size();
    }

    std::uint64_t written() const noexcept { return written_; }

private:
    Target& to_;
    std::uint64_t written_ = 0;
    std::binary_semaphore came_{0};
    std::error_code error_;
};

/// Saves with a format that streams: one thread, straight from the tensors into the sink, everything else stops.
template <sink Sink, streaming_format Format>
class stream_saver {
public:
    stream_saver(state const& s, Sink& sink, Format const& format, store* files, bool durable, observer_list const& observers)
        : state_(s), sink_(sink), format_(format), files_(files), durable_(durable), observers_(observers) {}

    void save(ticket_state& ticket, metadata_map metadata) {
        auto step = ticket.step();
        std::optional<slot> file;
        std::optional<typename Sink::target_type> target;
        std::error_code outcome;
        bool synced = true;
        try {
            if (files_) file = files_->acquire();
            target.emplace(sink_.open({files_ ? files_->folder() : -1, file ? file->name : std::string(), 0, step}));
            sequence_ = files_ ? files_->next_sequence() : sequence_ + 1;
            observers_.on({.what = milestone::write, .step = step});
            target_stream out(*target);
            format_.stream(state_, {step, sequence_, std::move(metadata)}, out);
            bytes_ = out.written();
            ticket.reach(goal::staged);
            observers_.on({.what = milestone::staged, .step = step, .bytes = bytes_});
            if (durable_) {
                outcome = target->sync();
                synced = !outcome;
            }
        } catch (error const& e) {
            outcome = e.code();
        } catch (std::exception const&) {
            outcome = std::make_error_code(std::errc::io_error);
        }
        target.reset();
        if (file) {
            try {
                if (outcome)
                    files_->give_back(*std::move(file), outcome, synced);
                else
                    outcome = files_->commit(*std::move(file), step, sequence_);
            } catch (std::exception const&) {
                if (!outcome) outcome = std::make_error_code(std::errc::not_enough_memory);
            }
        }
        if (outcome) {
            ticket.fail(outcome);
            observers_.on({.what = milestone::failed, .step = step, .error = outcome});
            return;
        }
        ticket.reach(goal::written);
        observers_.on({.what = milestone::written, .step = step, .bytes = bytes_});
        ticket.reach(goal::crash_safe);
        ticket.reach(goal::durable, durable_ ? std::error_code{} : make_error_code(errc::unsupported));
        if (durable_) observers_.on({.what = milestone::durable, .step = step, .bytes = bytes_});
    }

    /// Of the newest save; 0 before the first.
    std::uint64_t bytes() const noexcept { return bytes_; }

private:
    state const& state_;
    Sink& sink_;
    Format const& format_;
    store* const files_;
    bool const durable_;
    observer_list const observers_;
    std::uint64_t sequence_ = 0;
    std::uint64_t bytes_ = 0;
};

}  // namespace varve::detail
