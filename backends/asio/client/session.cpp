#include "session.hpp"

#include <boost/asio/post.hpp>

#include <algorithm>
#include <thread>

namespace varve::asio::client {

namespace {

using clock = std::chrono::steady_clock;

/// As many as one write to a socket takes, heads and what is behind them.
constexpr std::size_t most_at_once = 30;

}  // namespace

session::session(std::unique_ptr<dialogue> open, wire::welcome const& greeting, session_settings settings)
    : dialogue_(std::move(open)), settings_(std::move(settings)), greeting_(greeting), watch_(dialogue_->context()), end_(dialogue_->context()),
      silence_(clock::now()), next_number_(dialogue_->writer().next()), credit_(greeting.credit_bytes) {}

session::loans session::run() noexcept {
    try {
        dialogue_->context().restart();
        process();
        watch_silence();
        dialogue_->context().run();
    } catch (std::exception const& e) {
        lose(e.what());
        // What is pending refers to this.
        dialogue_->context().restart();
        dialogue_->context().run();
    }
    lose("it ended");
    std::lock_guard lock(mutex_);
    return std::exchange(loans_, {});
}

void session::await_end(std::chrono::milliseconds limit) noexcept try {
    if (!left_open_ || ended_by_monitor_) return std::this_thread::sleep_for(limit);
    if (!std::exchange(awaiting_, true))
        dialogue_->stream().read(rest_, 1, [this](std::error_code ec, std::size_t) {
            awaiting_ = false;
            if (ec && left_open_) ended_by_monitor_ = true;
        });
    dialogue_->context().restart();
    for (auto const until = clock::now() + limit; awaiting_ && dialogue_->context().run_one_until(until) > 0;) {
    }
} catch (std::exception const&) {
    std::this_thread::sleep_for(limit);
}

void session::close() noexcept try {
    if (!std::exchange(left_open_, false)) return;
    dialogue_->stream().close();
    dialogue_->context().restart();
    dialogue_->context().run();
} catch (std::exception const&) {
}

void session::finish(std::chrono::milliseconds limit) noexcept {
    std::lock_guard lock(mutex_);
    // What is posted to a connection that has ended would keep it for ever.
    if (lost_) return;
    try {
        last_ = outgoing_of(wire::goodbye{});
        finishing_ = true;
        boost::asio::post(dialogue_->context(), [self = shared_from_this(), limit] {
            self->end_.expires_after(limit);
            self->end_.async_wait([self](boost::system::error_code ec) {
                if (!ec) self->lose("the trainer has ended");
            });
            self->pump();
        });
    } catch (std::exception const&) {
        boost::asio::post(dialogue_->context(), [self = shared_from_this()] { self->lose("the trainer has ended"); });
    }
}

bool session::is_lost() const noexcept {
    std::lock_guard lock(mutex_);
    return lost_;
}

std::string session::why_lost() const {
    std::lock_guard lock(mutex_);
    return why_;
}

std::shared_ptr<relayed_save> session::begin(std::uint64_t id, std::uint64_t step, completion lost) {
    auto save = std::make_shared<relayed_save>(shared_from_this(), id, lost);
    {
        std::lock_guard lock(mutex_);
        saves_.emplace(id, save);
    }
    try {
        std::vector<outgoing> items;
        items.push_back(outgoing_of(wire::begin{id, step}));
        if (enqueue(std::move(items), id)) return save;
    } catch (std::exception const&) {
        save->detach();
        throw;
    }
    save->detach();
    throw error(errc::monitor_lost, "the monitor is lost: " + why_lost());
}

void session::write(std::uint64_t id, std::uint64_t offset_bytes, block const& b, completion done, loan kept) noexcept {
    std::error_code failed;
    try {
        bool const in_pool = b.slot >= 0 && static_cast<std::size_t>(b.slot) < settings_.regions.size();
        if (kept && in_pool)
            failed = lend(id, offset_bytes, b, std::move(kept));
        else if (!settings_.regions.empty() || b.memory == memory_kind::device)
            failed = errc::unsupported;  // the monitor reads the pool's blocks later, and no others; nor are a GPU's sent
        else if (send(id, offset_bytes, b, done, std::move(kept)))
            return;
        else
            failed = errc::monitor_lost;
    } catch (std::exception const&) {
        failed = std::make_error_code(std::errc::not_enough_memory);
    }
    done(failed);
}

std::error_code session::lend(std::uint64_t id, std::uint64_t offset_bytes, block const& b, loan kept) {
    auto const region = static_cast<std::uint32_t>(b.slot);
    auto const at = static_cast<std::uint64_t>(b.data - settings_.regions[region]);
    auto item = outgoing_of(wire::block_ref{id, offset_bytes, static_cast<std::uint32_t>(b.size_bytes), region, at});
    std::unique_lock lock(mutex_);
    if (lost_) return errc::monitor_lost;
    loans_.insert_or_assign({region, at}, std::move(kept));
    queue_.push_back(std::move(item));
    wake_locked();
    return {};
}

bool session::send(std::uint64_t id, std::uint64_t offset_bytes, block const& b, completion done, loan kept) {
    std::vector<outgoing> items;
    for (std::size_t at = 0; at < b.size_bytes;) {
        auto const n = std::min(settings_.piece_bytes, b.size_bytes - at);
        items.push_back(outgoing_of(wire::block_data{id, offset_bytes + at, {}}, {b.data + at, n}));
        at += n;
    }
    if (items.empty()) {
        done({});
        return true;
    }
    items.back().done = done;
    items.back().kept = std::move(kept);
    return enqueue(std::move(items), id);
}

bool session::commit(std::uint64_t id, commit_values const& values, std::span<std::uint64_t const> chunk_digests) {
    std::vector<outgoing> items;
    items.push_back(outgoing_of(wire::commit{id, values.metadata, {chunk_digests.begin(), chunk_digests.end()}}));
    saw_commit_ = true;
    return enqueue(std::move(items), id, true);
}

void session::abandon(std::uint64_t id) noexcept {
    try {
        std::vector<outgoing> items;
        items.push_back(outgoing_of(wire::abandon{id}));
        enqueue(std::move(items), id, true);
    } catch (std::exception const&) {
        // The monitor discards it with the connection at the latest.
    }
}

void session::forget(std::uint64_t id) noexcept {
    std::shared_ptr<relayed_save> gone;
    std::lock_guard lock(mutex_);
    if (auto it = saves_.find(id); it != saves_.end()) {
        gone = std::move(it->second);
        saves_.erase(it);
    }
    // Its last word may have come from the monitor: then nobody says another.
    if (auto it = payloads_.find(id); it != payloads_.end() && !std::exchange(it->second.ended, true)) try {
            wake_locked();
        } catch (std::exception const&) {
            // With what is queued next, or the next credit.
        }
}

void session::set_draining(bool on) noexcept {
    try {
        std::vector<outgoing> items;
        items.push_back(outgoing_of(wire::drain{on}));
        enqueue(std::move(items));
    } catch (std::exception const&) {
        // The saves take the time that they would have taken.
    }
}

template <class Message>
session::outgoing session::outgoing_of(Message const& m, std::span<std::byte const> behind) {
    outgoing out;
    wire::frame_writer{}.append_head(out.head, m, behind.size());
    out.behind = behind;
    return out;
}

bool session::enqueue(std::vector<outgoing> items, std::optional<std::uint64_t> save, bool ends) {
    std::lock_guard lock(mutex_);
    if (lost_) return false;
    auto* queue = &queue_;
    if (save && settings_.regions.empty()) {
        auto& of = payloads_[*save];
        of.ended = of.ended || ends || !saves_.contains(*save);
        queue = &of.queue;
    }
    queue->insert(queue->end(), std::make_move_iterator(items.begin()), std::make_move_iterator(items.end()));
    wake_locked();
    return true;
}

/// What goes out next, null where nothing may yet.
session::outgoing* session::next_locked() {
    if (!queue_.empty()) return &queue_.front();
    while (!payloads_.empty()) {
        auto& [id, oldest] = *payloads_.begin();
        if (!oldest.queue.empty()) return oldest.queue.front().behind.size() <= credit_ ? &oldest.queue.front() : nullptr;
        if (!oldest.ended) break;
        payloads_.erase(payloads_.begin());
    }
    return last_ && nothing_queued_locked() ? &*last_ : nullptr;
}

bool session::nothing_queued_locked() const {
    return queue_.empty() && std::all_of(payloads_.begin(), payloads_.end(), [](auto const& p) { return p.second.queue.empty(); });
}

void session::wake_locked() {
    if (woken_) return;
    boost::asio::post(dialogue_->context(), [self = shared_from_this()] {
        {
            std::lock_guard lock(self->mutex_);
            self->woken_ = false;
        }
        self->pump();
    });
    woken_ = true;
}

void session::pump() {
    if (!writing_.empty()) return;
    bool over = false;
    {
        std::lock_guard lock(mutex_);
        if (lost_) return;
        while (writing_.size() < most_at_once) {
            auto* const next = next_locked();
            if (!next) break;
            credit_ -= next->behind.size();
            wire::set_number(next->head, next_number_++);
            writing_.push_back(std::move(*next));
            if (last_ && next == &*last_)
                last_.reset();
            else if (!queue_.empty())
                queue_.pop_front();
            else
                payloads_.begin()->second.queue.pop_front();
        }
        // What is on loan is waited for: the monitor ends the connection when it has let go.
        over = writing_.empty() && finishing_ && !last_ && nothing_queued_locked() && loans_.empty();
    }
    if (over) return lose("the trainer has ended");
    if (writing_.empty()) return;
    std::vector<std::span<std::byte const>> pieces;
    for (auto const& o : writing_) {
        pieces.push_back(o.head);
        if (!o.behind.empty()) pieces.push_back(o.behind);
    }
    dialogue_->stream().write(pieces, [this](std::error_code ec, std::size_t) {
        for (auto& o : std::exchange(writing_, {}))
            if (o.done.done) o.done(ec ? make_error_code(errc::monitor_lost) : std::error_code{});
        // A Unix socket says so when its other end is closed.
        if (!is_lost() && (ec == std::errc::broken_pipe || ec == std::errc::connection_reset)) ended_by_monitor_ = true;
        if (ec)
            lose(ec.message());
        else
            pump();
    });
}

/// Takes what has come, and waits for more.
void session::process() {
    try {
        while (auto const next = dialogue_->buffer().next()) {
            take(next->first, next->second);
            std::lock_guard lock(mutex_);
            if (lost_) return;
        }
    } catch (std::exception const& e) {
        return lose(e.what());
    }
    awaiting_ = true;
    dialogue_->stream().read(dialogue_->buffer().room(), 1, [this](std::error_code ec, std::size_t n) {
        awaiting_ = false;
        if (is_lost()) {
            if (ec && left_open_) ended_by_monitor_ = true;
            return;
        }
        silence_.broken(clock::now());
        dialogue_->buffer().filled(n);
        if (ec && n == 0) {
            ended_by_monitor_ = true;
            return lose(ec.message());
        }
        process();
    });
}

void session::take(wire::message type, std::span<std::byte const> payload) {
    auto const refuse = [](char const* what) { throw error(errc::malformed, std::string("malformed message: ") + what); };
    wire::decode(type, payload, [&]<class Message>(Message const& m) {
        if constexpr (std::same_as<Message, wire::credit>) {
            {
                std::lock_guard lock(mutex_);
                if (__builtin_add_overflow(credit_, m.bytes, &credit_)) refuse("more credit than there can be");
            }
            pump();
        } else if constexpr (std::same_as<Message, wire::release>) {
            loan ended;
            {
                std::lock_guard lock(mutex_);
                auto it = loans_.find({m.region, m.region_offset});
                if (it == loans_.end()) refuse("a block comes back that was not lent");
                ended = std::move(it->second);
                loans_.erase(it);
            }
            pump();
        } else if constexpr (std::same_as<Message, wire::crash_safe>) {
            if (auto const save = find(m.save)) save->crash_safe();
        } else if constexpr (std::same_as<Message, wire::durable>) {
            saw_durable_ = true;
            if (auto const save = find(m.save)) save->durable();
            forget(m.save);
        } else if constexpr (std::same_as<Message, wire::failed>) {
            if (auto const save = find(m.save)) save->failed(m.code ? m.code : make_error_code(errc::monitor_lost));
            forget(m.save);
        } else if constexpr (std::same_as<Message, wire::ping>) {
            std::vector<outgoing> items;
            items.push_back(outgoing_of(wire::pong{}));
            enqueue(std::move(items));
        } else if constexpr (std::same_as<Message, wire::refusal>) {
            lose(m.text, !settings_.regions.empty());
        } else {
            refuse("out of place");
        }
    });
}

/// Null for a save that nobody waits for any more.
std::shared_ptr<relayed_save> session::find(std::uint64_t id) {
    std::lock_guard lock(mutex_);
    auto const it = saves_.find(id);
    return it == saves_.end() ? nullptr : it->second;
}

void session::watch_silence() {
    auto const period = std::max(settings_.silence / 4, std::chrono::milliseconds(1));
    watch_.expires_after(period);
    watch_.async_wait([this, period](boost::system::error_code ec) {
        if (ec) return;
        auto const silent = silence_.lasted(clock::now(), period);
        // A monitor that has blocks of ours is heard to the end: until it lets them go, or dies.
        bool const lent = !settings_.regions.empty();
        if (silent >= settings_.silence) {
            lose("it says nothing", lent);
            if (lent) dialogue_->stream().end_writing();
            return;
        }
        watch_silence();
    });
}

/// Left open, it is only listened to from then on: see await_end().
void session::lose(std::string const& why, bool leave_open) noexcept {
    std::deque<outgoing> unsent;
    std::map<std::uint64_t, payload> unsent_payloads;
    std::map<std::uint64_t, std::shared_ptr<relayed_save>> waiting;
    {
        std::lock_guard lock(mutex_);
        if (std::exchange(lost_, true)) return;
        try {
            why_ = why;
        } catch (std::bad_alloc const&) {
        }
        unsent.swap(queue_);
        unsent_payloads.swap(payloads_);
        waiting.swap(saves_);
    }
    left_open_ = leave_open;
    if (leave_open)
        dialogue_->context().stop();
    else
        dialogue_->stream().close();
    watch_.cancel();
    end_.cancel();
    auto const end = [](std::deque<outgoing> const& queue) {
        for (auto const& o : queue)
            if (o.done.done) o.done(errc::monitor_lost);
    };
    end(unsent);
    for (auto const& [id, of] : unsent_payloads) end(of.queue);
    for (auto const& [id, save] : waiting) save->failed(errc::monitor_lost);
}

}  // namespace varve::asio::client
