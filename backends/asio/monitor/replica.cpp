#include "replica.hpp"

#include <fcntl.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "varve/detail/granules.hpp"
#include "varve/detail/range_reader.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/detail/text.hpp"
#include "varve/detail/thread_name.hpp"
#include "varve/error.hpp"
#include "varve/format/safetensors.hpp"

namespace varve::asio::server {

namespace {

using varve::detail::granule_bytes;

/// Granules that are read, hashed and sent at once.
constexpr std::size_t pieces = 4;
/// For the goodbye: nothing of ours is on loan there.
constexpr std::chrono::milliseconds goodbye_limit{1'000};

monitor_sink_options options_of(replica_settings const& s) {
    monitor_sink_options o;
    o.tls = s.tls;
    o.files.keep = static_cast<std::size_t>(s.run.keep);
    o.files.keep_every = s.run.keep_every;
    o.files.prepare = s.run.prepare;
    o.files.fresh = s.run.fresh;
    o.files.overwrite = s.run.overwrite;
    o.files.made_by = s.run.made_by;
    o.retry_after = std::min(o.retry_after, s.retry_every);
    o.goodbye_limit = goodbye_limit;
    return o;
}

/// Pieces of a file on their way out. Outlives every write that was begun.
class sending_pieces {
public:
    struct piece {
        sending_pieces* in = nullptr;
        varve::detail::aligned_buffer memory{granule_bytes + varve::detail::range_reader::slack_bytes};
        bool busy = false;
    };

    sending_pieces() {
        for (auto& p : pieces_) p.in = this;
    }
    ~sending_pieces() {
        wait([this] { return std::none_of(pieces_.begin(), pieces_.end(), [](auto const& p) { return p.busy; }); });
    }

    /// One that is not on its way. Throws what a write ended with.
    piece& free_piece() {
        piece* found = nullptr;
        std::error_code failed;
        wait([&] {
            auto it = std::find_if(pieces_.begin(), pieces_.end(), [](auto const& p) { return !p.busy; });
            found = it == pieces_.end() ? nullptr : &*it;
            failed = failed_;
            return found != nullptr;
        });
        if (failed) throw error(failed, failed.message());
        return *found;
    }
    void send(client::relayed_save& save, piece& p, std::uint64_t offset, std::span<std::byte const> bytes) {
        {
            std::lock_guard lock(mutex_);
            p.busy = true;
        }
        save.write(offset, {bytes.data(), bytes.size()},
                   {[](void* context, std::error_code ec) noexcept {
                        auto& sent = *static_cast<piece*>(context);
                        std::lock_guard lock(sent.in->mutex_);
                        sent.busy = false;
                        if (ec && !sent.in->failed_) sent.in->failed_ = ec;
                        sent.in->changed_.notify_all();
                    },
                    &p},
                   {});
    }

private:
    template <class Done>
    void wait(Done done) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, done);
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::error_code failed_;
    std::array<piece, pieces> pieces_;
};

/// What a commit is answered with, once it is.
class answer {
public:
    completion on() {
        return {[](void* context, std::error_code ec) noexcept {
                    auto& self = *static_cast<answer*>(context);
                    std::lock_guard lock(self.mutex_);
                    self.outcome_ = ec;
                    self.came_.notify_all();
                },
                this};
    }
    std::error_code wait() {
        std::unique_lock lock(mutex_);
        came_.wait(lock, [this] { return outcome_.has_value(); });
        return *outcome_;
    }

private:
    std::mutex mutex_;
    std::condition_variable came_;
    std::optional<std::error_code> outcome_;
};

}  // namespace

std::uint64_t const replica::memory_bytes = pieces * (granule_bytes + varve::detail::range_reader::slack_bytes);

replica::replica(replica_settings settings, std::optional<local_checkpoint> newest, std::shared_ptr<replica>& before)
    : settings_(std::move(settings)), relay_(settings_.peer, settings_.store.filename().string(), options_of(settings_), true), newest_(newest),
      highest_step_(newest ? newest->step : 0) {
    if (before) {
        std::lock_guard lock(before->mutex_);
        there_.durable_sequence = before->there_.durable_sequence;
    }
    tensors_.layers = settings_.run.layers;
    tensors_.aliases = settings_.run.aliases;
    before_ = std::move(before);
    try {
        thread_ = std::jthread([this] {
            varve::detail::name_this_thread("varve-replica");
            run();
        });
    } catch (...) {
        before = std::move(before_);
        throw;
    }
}

replica::~replica() {
    cancel();
    thread_.join();
}

void replica::offer(local_checkpoint c) {
    std::lock_guard lock(mutex_);
    if (newest_ && c.sequence <= newest_->sequence) return;
    newest_ = c;
    settled_ = false;
    highest_step_ = std::max(highest_step_, c.step);
    // Somebody trains from before what the peer has: it would let go of that for this.
    if (connected_ && peer_is_ahead() && !std::exchange(said_ahead_, true))
        settings_.log(settings_.store.string() + ": step " + std::to_string(c.step) + " does not go to the peer at " + settings_.peer.text() + ": " +
                      why_);
    changed_.notify_all();
}

void replica::finish() {
    std::lock_guard lock(mutex_);
    finishing_ = true;
    changed_.notify_all();
}

void replica::finish_within(std::chrono::milliseconds limit) {
    bool at_once = false;
    {
        std::lock_guard lock(mutex_);
        if (over_) return;
        finishing_ = true;
        auto const by = clock::now() + limit;
        deadline_ = deadline_ ? std::min(*deadline_, by) : by;
        at_once = tried_ && !connected_;
        if (!at_once && has_work())
            settings_.log(settings_.store.string() + ": waits until the peer has the checkpoint of step " + std::to_string(newest_->step));
        changed_.notify_all();
    }
    if (at_once) cancel();
}

void replica::cancel() {
    {
        std::lock_guard lock(mutex_);
        cancelled_ = true;
        changed_.notify_all();
    }
    relay_.cancel();
}

bool replica::over() const {
    std::lock_guard lock(mutex_);
    return over_;
}

bool replica::is_finished() const noexcept {
    if (cancelled_) return true;
    if (!finishing_) return false;
    if (deadline_ && (clock::now() >= *deadline_ || (tried_ && !connected_))) return true;
    return tried_ && !has_work();
}

void replica::run() noexcept {
    before_.reset();
    memory_ = settings_.memory();
    std::unique_lock lock(mutex_);
    while (!is_finished()) {
        lock.unlock();
        bool const went_well = reach() && send_newest();
        // While nothing is sent it is a trainer's.
        if (!went_well) memory_.reset();
        lock.lock();
        tried_ = true;
        if (is_finished()) break;
        auto until = clock::now() + settings_.retry_every;
        if (deadline_) until = std::min(until, *deadline_);
        changed_.wait_until(lock, until, [&] { return is_finished() || (went_well && has_work()); });
    }
    bool const left = newest_ && !settled_;
    connected_ = false;
    there_.sending.reset();
    if (why_.empty()) why_ = left ? "the monitor ended before it had the newest" : "its trainer has gone, and the peer has the newest";
    lock.unlock();
    session_.reset();
    relay_.cancel(goodbye_limit);
    memory_.reset();
    lock.lock();
    over_ = true;
    lock.unlock();
    settings_.ended();
}

/// Whether there is a connection on which this run was welcomed.
bool replica::reach() noexcept try {
    if (!introduced_) {
        image layout;
        layout.header_bytes = settings_.run.header_bytes;
        layout.size_bytes = settings_.run.image_bytes;
        relay_.introduce({tensors_, layout, settings_.run.extension, granule_bytes, 1, when_busy::block});
        introduced_ = true;
    }
    auto const current = relay_.connected();
    if (current != session_) {
        session_ = current;
        greeted(current->greeting());
    }
    return true;
} catch (std::exception const& e) {
    trouble(e.what());
    return false;
}

void replica::greeted(wire::welcome const& there) {
    std::string line;
    {
        std::lock_guard lock(mutex_);
        connected_ = true;
        if (!std::exchange(why_, {}).empty()) line = "the peer at " + settings_.peer.text() + " is there";
        there_.welcomed_step = there_.durable_step = there_.crash_safe_step = there.durable_step;
        // What it was sent before. Another one of the same step may be of another run, or of the same one that went back.
        settled_ = newest_ && newest_->step == there.durable_step && there_.durable_sequence == newest_->sequence;
        if (peer_is_ahead()) why_ = "its store stands at step " + std::to_string(there.durable_step) + " already: what comes before is not sent";
    }
    if (!line.empty()) settings_.log(settings_.store.string() + ": " + line);
}

/// Said when it begins.
void replica::trouble(std::string const& why) {
    {
        std::lock_guard lock(mutex_);
        connected_ = introduced_ && session_ && !session_->is_lost();
        if (cancelled_) return;
        if (!std::exchange(why_, why).empty()) return;
    }
    settings_.log(settings_.store.string() + ": nothing reaches the peer at " + settings_.peer.text() + ": " + why + "; it is tried again");
}

/// False where it failed.
bool replica::send_newest() noexcept {
    local_checkpoint c;
    {
        std::lock_guard lock(mutex_);
        if (!has_work()) return true;
        c = *newest_;
        there_.sending = c.step;
    }
    auto const since = clock::now();
    std::string why;
    bool gone = false;
    try {
        send(c);
    } catch (error const& e) {
        why = e.what();
        gone = e.code() == std::errc::no_such_file_or_directory;
    } catch (std::exception const& e) {
        why = e.what();
    }
    {
        std::lock_guard lock(mutex_);
        there_.sending.reset();
        if (!why.empty()) there_.crash_safe_step = there_.durable_step;
        bool const is_newest = newest_->sequence == c.sequence;
        if (why.empty()) {
            there_.sending_time += clock::now() - since;
            ++there_.sent;
            there_.welcomed_step = there_.durable_step = c.step;
            there_.durable_sequence = c.sequence;
            if (is_newest) settled_ = true;
            why_.clear();
            return true;
        }
        // Let go before it was opened: a newer one has come, or somebody cleared the store.
        if (gone && is_newest) settled_ = true;
    }
    if (gone) return true;
    trouble(why);
    return false;
}

/// Throws where the peer has not committed it.
void replica::send(local_checkpoint const& c) {
    auto const path = settings_.store / varve::detail::checkpoint_name(c.step, settings_.run.extension);
    file_descriptor const file(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    if (!file) throw_if(last_system_error(errno), path.string());
    if (!memory_) memory_ = settings_.memory();
    if (!memory_) throw error(std::make_error_code(std::errc::not_enough_memory), "no memory to send with is left under --memory-mb");
    auto const outline = varve::detail::read_outline(file.get());
    auto const about = safetensors().identify(file.get());
    if (about.step != c.step || outline.extent.file_bytes != settings_.run.image_bytes || outline.extent.data_offset != settings_.run.header_bytes)
        throw error(errc::not_whole, path.string() + ": not what was committed");

    struct wanted {
        std::shared_ptr<client::relayed_save> save;
        ~wanted() { save->detach(); }
    };
    sending_pieces out;
    answer safe, durable;
    wanted const w{relay_.open(c.step)};
    varve::detail::range_reader const reader(file.get());
    auto const data_bytes = outline.extent.data_bytes();
    std::vector<std::uint64_t> digests(varve::detail::chunk_count(data_bytes));
    for (std::uint64_t begin = 0; begin < data_bytes; begin += granule_bytes) {
        auto const size = static_cast<std::size_t>(std::min<std::uint64_t>(granule_bytes, data_bytes - begin));
        auto const offset = outline.extent.data_offset + begin;
        auto& p = out.free_piece();
        auto* const to = p.memory.data() + offset % varve::detail::range_reader::alignment;
        reader.read(to, offset, size, reader.is_cached(offset) ? reader.read_cached(to, offset, size) : 0);
        auto const chunks = std::span(digests).subspan(begin / digest_chunk_bytes, varve::detail::chunk_count(size));
        varve::detail::chunk_digests({to, size}, chunks);
        if (varve::detail::parse_hex(
                std::string_view(*outline.digests).substr(begin / granule_bytes * varve::detail::digest_digits, varve::detail::digest_digits)) !=
            varve::detail::granule_digest(chunks))
            throw error(errc::not_whole, path.string() + ": bytes at " + std::to_string(offset) + " do not fit their digest");
        out.send(*w.save, p, offset, {to, size});
        std::lock_guard lock(mutex_);
        there_.bytes += size;
    }
    w.save->hand_over({c.step, c.sequence, about.metadata}, digests, safe.on(), durable.on());
    throw_if(safe.wait(), "the checkpoint of step " + std::to_string(c.step) + " is not taken");
    {
        std::lock_guard lock(mutex_);
        there_.crash_safe_step = c.step;
    }
    throw_if(durable.wait(), "the checkpoint of step " + std::to_string(c.step) + " is not committed");
}

void replica::describe(nlohmann::json& out) const {
    std::lock_guard lock(mutex_);
    out["path"] = varve::detail::printable(settings_.store.string());
    out["connected"] = connected_;
    if (!why_.empty()) out["why"] = varve::detail::printable(why_);
    if (newest_) out["step"] = newest_->step;
    out["up_to_date"] = !newest_ || settled_;
    if (there_.sending) out["sending_step"] = *there_.sending;
    if (there_.crash_safe_step > 0) out["crash_safe_step"] = there_.crash_safe_step;
    if (there_.durable_step > 0) out["durable_step"] = there_.durable_step;
    out["sent"] = there_.sent;
    out["bytes_sent"] = there_.bytes;
    auto const seconds = std::chrono::duration<double>(there_.sending_time).count();
    if (seconds > 0) out["sent_gb_per_s"] = static_cast<double>(there_.bytes) / seconds / 1e9;
}

}  // namespace varve::asio::server
