#include "relay.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "varve/detail/thread_name.hpp"

namespace varve::asio::client {

namespace {

using clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds between_tries{20};
constexpr int rest_after_a_try = 4;  ///< times what it took
constexpr std::chrono::milliseconds least_goodbye{20};
constexpr std::chrono::milliseconds looks_up_every{20};  ///< who waits for the end of a connection that was lost

}  // namespace

relay::relay(address where, std::string store, monitor_sink_options options, bool for_monitor)
    : where_(std::move(where)), store_(std::move(store)), options_(std::move(options)), for_monitor_(for_monitor) {}

relay::~relay() {
    auto const until = clock::now() + options_.goodbye_limit;
    {
        // Blocks of a connection that was lost come back with the next one, which is then said goodbye to.
        std::unique_lock lock(mutex_);
        if (runner_.joinable()) changed_.wait_until(lock, until, [&] { return !current_ || !current_->is_lost() || settled_ == current_.get(); });
    }
    std::shared_ptr<session> last;
    ending_ = true;
    {
        std::lock_guard connecting(connecting_);
        std::lock_guard lock(mutex_);
        last = current_;
    }
    if (last) last->finish(std::max(std::chrono::duration_cast<std::chrono::milliseconds>(until - clock::now()), least_goodbye));
    runner_.request_stop();
    if (runner_.joinable()) runner_.join();
}

int relay::register_memory(std::span<std::byte> region) {
    if (!options_.pool || !where_.is_unix()) return unregistered;
    auto const regions = options_.pool->regions();
    for (std::size_t i = 0; i < regions.size(); ++i)
        if (regions[i].memory.data() == region.data() && regions[i].memory.size() == region.size()) {
            by_reference_ = true;
            return static_cast<int>(i);
        }
    return unregistered;
}

void relay::introduce(relayed_run const& run) {
    if (run.memory == memory_kind::device && !by_reference_)
        throw error(errc::unsupported, "GPU memory goes to a monitor through a pool that both have alone, on this host");
    if (options_.durable_interval.count() > 0 && run.busy != when_busy::replace)
        throw error(std::make_error_code(std::errc::invalid_argument), "an interval between durable saves is for when_busy::replace");
    std::lock_guard connecting(connecting_);
    hello_.store = store_;
    hello_.relayed = for_monitor_;
    hello_.made_by = options_.files.made_by;
    hello_.extension = run.extension;
    hello_.layers = run.tensors.layers;
    hello_.aliases = run.tensors.aliases;
    hello_.image_bytes = run.layout.size_bytes;
    hello_.header_bytes = run.layout.header_bytes;
    hello_.block_bytes = run.block_bytes;
    hello_.in_flight = static_cast<std::uint32_t>(run.in_flight);
    hello_.busy = run.busy;
    hello_.keep = options_.files.keep;
    hello_.keep_every = options_.files.keep_every;
    hello_.prepare = options_.files.prepare;
    hello_.fresh = options_.files.fresh;
    hello_.overwrite = options_.files.overwrite;
    hello_.wait_until_prepared = options_.files.wait_until_prepared;
    hello_.durable_interval_ms = static_cast<std::uint64_t>(std::clamp(options_.durable_interval, {}, wire::longest_interval).count());
    if (by_reference_) {
        hello_.device = options_.pool->device();
        for (auto const& r : options_.pool->regions()) hello_.region_bytes.push_back(r.memory.size());
    }
    install(greet_first());
    runner_ = std::jthread([this](std::stop_token stop) {
        varve::detail::name_this_thread("varve-relay");
        this->run(stop);
    });
}

/// One that is ending, or dying, may still be reached and welcomes nobody: with `respawn`, the next one is waited for.
std::shared_ptr<session> relay::greet_first() {
    for (auto const until = clock::now() + options_.connect_limit;;) {
        try {
            return greet(reach());
        } catch (error const& e) {
            bool const ends = e.code() == errc::monitor_lost || e.code() == errc::cancelled;
            if (!ends || !options_.respawn || ending_ || clock::now() >= until) throw;
        }
        std::this_thread::sleep_for(between_tries);
    }
}

std::unique_ptr<dialogue> relay::try_to_reach() { return std::make_unique<dialogue>(where_, options_.tls, options_.connect_limit, ending_); }

std::unique_ptr<dialogue> relay::reach() {
    std::string why;
    try {
        return try_to_reach();
    } catch (error const& e) {
        why = e.what();
    }
    if (options_.respawn) {
        options_.respawn();
        for (auto const until = clock::now() + options_.connect_limit;;) {
            try {
                return try_to_reach();
            } catch (error const& e) {
                why = e.what();
                if (clock::now() >= until) break;
            }
            std::this_thread::sleep_for(between_tries);
        }
    }
    throw error(errc::monitor_lost, why);
}

/// It pings while it gets ready; one that says nothing at all is stuck.
wire::welcome relay::welcome(dialogue& open, deadline at_most) const {
    return open.expect<wire::welcome>(std::min(clock::now() + options_.silence_limit, at_most), options_.silence_limit, at_most);
}

std::shared_ptr<session> relay::greet(std::unique_ptr<dialogue> open) {
    auto const start = clock::now();
    session_settings settings;
    settings.silence = options_.silence_limit;
    std::vector<int> descriptors;
    if (by_reference_)
        for (auto const& r : options_.pool->regions()) {
            descriptors.push_back(r.descriptor.get());
            settings.regions.push_back(r.memory.data());
        }
    open->send(hello_, clock::now() + options_.connect_limit, std::move(descriptors));
    auto const greeting = [&] {
        try {
            return welcome(*open, start + options_.welcome_limit);
        } catch (error const& e) {
            if (e.code() != errc::malformed) throw;
            throw error(e.code(), std::string(e.what()) + "; is the monitor of another version of varve?");
        }
    }();
    if (greeting.version != wire::version)
        throw error(errc::unsupported, "the monitor at " + where_.text() + " speaks version " + std::to_string(greeting.version) +
                                           " of the protocol, not " + std::to_string(wire::version));
    if (!by_reference_) {
        auto const most = std::min<std::uint64_t>({hello_.block_bytes, wire::most_data_bytes, greeting.credit_bytes});
        settings.piece_bytes = static_cast<std::size_t>(most / digest_chunk_bytes * digest_chunk_bytes);
        if (settings.piece_bytes == 0)
            throw error(std::make_error_code(std::errc::not_enough_memory), "the monitor at " + where_.text() + " takes no bytes");
    }
    return std::make_shared<session>(std::move(open), greeting, std::move(settings));
}

std::shared_ptr<session> relay::greet_again(std::unique_ptr<dialogue> open, session const& last) {
    // What this run has committed is not what it was to start over from, or to replace.
    if (last.saw_durable() || (last.saw_commit() && !hello_.overwrite)) hello_.fresh = hello_.overwrite = false;
    return greet(std::move(open));
}

void relay::install(std::shared_ptr<session> s) {
    {
        std::lock_guard lock(mutex_);
        current_ = std::move(s);
        settled_ = nullptr;
        if (draining_) current_->set_draining(true);
        // A welcome that came while this sink ends: nobody else says goodbye to it.
        if (ending_) current_->finish(options_.goodbye_limit);
    }
    changed_.notify_all();
}

std::shared_ptr<session> relay::connected() {
    // Who waits for a welcome may do so for a minute, while a monitor gets ready; a save does not.
    std::unique_lock connecting(connecting_, std::chrono::system_clock::now() + options_.connect_limit);
    if (!connecting) throw lost(where_.text(), "it has not answered yet");
    std::shared_ptr<session> last;
    {
        std::lock_guard lock(mutex_);
        last = current_;
    }
    if (!last) throw error(errc::out_of_order, "a monitor is introduced to a run before its first save");
    if (!last->is_lost()) return last;
    auto const start = clock::now();
    if (start < not_before_) throw lost(where_.text(), last->why_lost());
    try {
        auto anew = greet_again(reach(), *last);
        install(anew);
        return anew;
    } catch (error const& e) {
        put_off(start);
        throw error(errc::monitor_lost, e.what());
    }
}

/// A try may have taken long, with training waiting for it: most of the time it does not. Of a stop of this process in a try no more
/// counts than the limit of a welcome.
void relay::put_off(clock::time_point start_of_the_last) {
    auto const now = clock::now();
    auto const took = std::min<clock::duration>(now - start_of_the_last, options_.welcome_limit);
    not_before_ = now + std::max<clock::duration>(options_.retry_after, rest_after_a_try * took);
}

void relay::cancel(std::chrono::milliseconds goodbye) noexcept {
    ending_ = true;
    std::lock_guard lock(mutex_);
    if (current_) current_->finish(goodbye);
}

std::shared_ptr<relayed_save> relay::open(std::uint64_t step, completion lost) {
    auto const s = connected();
    // The monitor takes them in the order of their numbers.
    std::lock_guard beginning(beginning_);
    return s->begin(next_save_++, step, lost);
}

void relay::set_draining(bool on) noexcept {
    if (options_.durable_interval.count() <= 0) return;
    std::lock_guard lock(mutex_);
    draining_ = on;
    if (current_) current_->set_draining(on);
}

void relay::run(std::stop_token stop) {
    std::shared_ptr<session> ran;
    for (;;) {
        {
            std::unique_lock lock(mutex_);
            if (!changed_.wait(lock, stop, [&] { return current_ != ran; }) && current_ == ran) return;
            ran = current_;
        }
        settle(*ran, ran->run());
        ran->close();
        {
            std::lock_guard lock(mutex_);
            settled_ = ran.get();
        }
        changed_.notify_all();
    }
}

/// Blocks that were lent to a connection that ended may still be read by the monitor, if it is alive: they end when its welcome
/// says that it is done, or when it has died. Meanwhile they stay as they are.
void relay::settle(session& ended, session::loans loans) noexcept {
    while (!loans.empty()) {
        if (try_to_settle(ended)) return;
        if (ending_) break;
        ended.await_end(std::min(options_.retry_after, looks_up_every));
    }
    for (auto& [where, l] : loans) l.keep_for_good();
}

/// Whether what was lent to it is read no more.
bool relay::try_to_settle(session& ended) noexcept {
    std::lock_guard connecting(connecting_);
    {
        std::lock_guard lock(mutex_);
        if (current_.get() != &ended) return true;  // another one was welcomed
        // The sink has said goodbye, and the monitor has ended the connection: it lets go first.
        if (ending_) return ended.ended_by_monitor();
    }
    auto const start = clock::now();
    // Who has ended the connection is stuck no longer.
    if (start < not_before_ && !ended.ended_by_monitor()) return false;
    try {
        auto open = ended.ended_by_monitor() ? try_to_reach() : reach();
        install(greet_again(std::move(open), ended));
        return true;
    } catch (std::exception const&) {
        // Nobody is there any more, or it refuses this run, and the next save says why. It ends a connection only when it has let
        // the pool go.
        if (ended.ended_by_monitor()) {
            not_before_ = {};
            return true;
        }
        put_off(start);
        return false;
    }
}

std::optional<fetched_checkpoint> relay::fetch(std::optional<std::uint64_t> step, std::uint32_t skip, receiver const& into) {
    std::unique_ptr<dialogue> open;
    {
        std::lock_guard connecting(connecting_);
        open = reach();
    }
    wire::hello h;
    h.purpose = wire::purpose::fetch;
    h.store = store_;
    h.relayed = for_monitor_;
    h.extension = ".safetensors";
    open->send(h, clock::now() + options_.connect_limit);
    welcome(*open, clock::now() + options_.welcome_limit);
    open->send(wire::fetch{step.has_value(), step.value_or(0), skip}, clock::now() + options_.connect_limit);
    // It may have to be fetched from a peer first.
    auto const about = open->expect<wire::image>(clock::now() + options_.welcome_limit, options_.silence_limit);
    if (about.size_bytes == 0) return std::nullopt;
    fetched_checkpoint out{{}, about.step, about.sequence, about.name};
    if (open->stream().passes_descriptors()) {
        auto descriptors = open->stream().take_descriptors();
        if (descriptors.size() != 1) throw error(errc::malformed, "malformed message: an image without its descriptor");
        out.file = std::move(descriptors.front());
    } else {
        out.file = into(about);
        if (!out.file) return out;
        receive_image(*open, about, out.file.get());
    }
    open->send(wire::goodbye{}, clock::now() + options_.connect_limit);
    return out;
}

file_descriptor relay::in_memory(wire::image const& about) {
    file_descriptor fd(::memfd_create("varve-fetched", MFD_CLOEXEC), system_calls::kernel());
    if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(about.size_bytes)) != 0) throw_if(last_system_error(errno), "no memory for the checkpoint");
    return fd;
}

void relay::receive_image(dialogue& from, wire::image const& about, int into) {
    for (std::uint64_t at = 0; at < about.size_bytes;) {
        auto const piece = from.expect<wire::image_data>(clock::now() + options_.connect_limit);
        if (piece.offset != at || piece.bytes.empty() || piece.bytes.size() > about.size_bytes - at)
            throw error(errc::malformed, "malformed message: a piece of an image out of its place");
        for (std::size_t done = 0; done < piece.bytes.size();) {
            auto const n = ::pwrite(into, piece.bytes.data() + done, piece.bytes.size() - done, static_cast<off_t>(at + done));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) throw_if(last_system_error(errno), "no room for the checkpoint");
            done += static_cast<std::size_t>(n);
        }
        at += piece.bytes.size();
    }
}

std::string relay::describe() const {
    auto text = "monitor at " + where_.text();
    if (by_reference_)
        text += ", blocks by reference: " + std::to_string(options_.pool->regions().size()) + " regions of " +
                (options_.pool->device().empty() ? "shared memory" : "GPU memory");
    else
        text += ", blocks are sent";
    return text + (options_.tls ? ", TLS" : "");
}

}  // namespace varve::asio::client
