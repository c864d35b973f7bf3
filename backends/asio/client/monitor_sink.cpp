#include "varve/asio/monitor_sink.hpp"

#include <utility>

#include "relay.hpp"

namespace varve::asio {

monitor_sink::target_type::target_type(std::shared_ptr<client::relayed_save> save) noexcept : save_(std::move(save)) {}
monitor_sink::target_type::target_type(target_type&&) noexcept = default;
monitor_sink::target_type& monitor_sink::target_type::operator=(target_type&& other) noexcept {
    if (this != &other) {
        if (save_) save_->detach();
        save_ = std::move(other.save_);
    }
    return *this;
}
monitor_sink::target_type::~target_type() {
    if (save_) save_->detach();
}

void monitor_sink::target_type::write(std::uint64_t offset_bytes, block const& b, completion done) noexcept {
    save_->write(offset_bytes, b, done, {});
}
void monitor_sink::target_type::write(std::uint64_t offset_bytes, block const& b, completion done, loan kept) noexcept {
    save_->write(offset_bytes, b, done, std::move(kept));
}
void monitor_sink::target_type::hand_over(commit_values const& values, std::span<std::uint64_t const> chunk_digests, completion crash_safe,
                                          completion durable) noexcept {
    save_->hand_over(values, chunk_digests, crash_safe, durable);
}

monitor_sink::monitor_sink(address where, std::string store, monitor_sink_options options)
    : relay_(std::make_unique<client::relay>(std::move(where), std::move(store), std::move(options))) {}
monitor_sink::monitor_sink(monitor_sink&&) noexcept = default;
monitor_sink& monitor_sink::operator=(monitor_sink&&) noexcept = default;
monitor_sink::~monitor_sink() = default;

int monitor_sink::register_memory(std::span<std::byte> region) { return relay_->register_memory(region); }
void monitor_sink::introduce(relayed_run const& run) { relay_->introduce(run); }
bool monitor_sink::takes_digests() const noexcept { return !relay_->by_reference(); }
monitor_sink::target_type monitor_sink::open(open_request const& r) { return target_type(relay_->open(r.step, r.lost)); }
void monitor_sink::set_draining(bool on) noexcept { relay_->set_draining(on); }
std::optional<fetched_checkpoint> monitor_sink::fetch(std::optional<std::uint64_t> step, std::uint32_t skip) { return relay_->fetch(step, skip); }
sink_limits monitor_sink::limits() const noexcept { return {.queue_depth = 64}; }
std::string monitor_sink::describe() const { return relay_->describe(); }

}  // namespace varve::asio
