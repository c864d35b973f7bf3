#include "session.hpp"

#include <boost/asio/dispatch.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>

#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

namespace varve::asio::server {

namespace {

constexpr std::size_t buffer_bytes = 64u << 10;
/// Payloads grow by no more than this at once, so that a length that is not kept costs no memory.
constexpr std::size_t step_bytes = 1u << 20;
constexpr std::size_t piece_bytes = 4u << 20;
/// A peer that takes nothing while so much waits for it is let go.
constexpr std::size_t most_waiting_bytes = 16u << 20;
constexpr std::size_t data_head_bytes = 16;  ///< of a BLOCK_DATA before its bytes
constexpr std::chrono::milliseconds farewell_limit{2'000};
/// For what somebody has still to say who does not hear.
constexpr std::chrono::milliseconds last_words_limit{5'000};

[[noreturn]] void refuse(std::string const& why) { throw error(errc::malformed, "malformed message: " + why); }

/// Empty where they cannot be read.
std::vector<std::byte> bytes_of(file_descriptor const& file, std::uint64_t offset, std::size_t size) try {
    std::vector<std::byte> out(size);
    for (std::size_t done = 0; done < size;) {
        auto const n = ::pread(file.get(), out.data() + done, size - done, static_cast<off_t>(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return {};
        done += static_cast<std::size_t>(n);
    }
    return out;
} catch (std::bad_alloc const&) {
    return {};
}

}  // namespace

session::session(std::shared_ptr<core> in, std::unique_ptr<stream> connection)
    : core_(std::move(in)), stream_(std::move(connection)), peer_(stream_->peer()), over_network_(!stream_->passes_descriptors()),
      timer_(stream_->executor()), age_(clock::now()), silence_(clock::now()), pinged_(clock::now()), buffer_(buffer_bytes) {}

void session::start() {
    boost::asio::dispatch(stream_->executor(), [self = shared_from_this()] {
        self->tick();
        self->read();
    });
}

void session::end(error why) {
    boost::asio::post(stream_->executor(), [self = shared_from_this(), why = std::move(why)] { self->fail(why); });
}

// ---- reading ----

void session::read() {
    if (reading_ || state_ >= state::ending) return;
    if (begin_ > 0) {
        std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
        end_ -= begin_;
        begin_ = 0;
    }
    reading_ = true;
    stream_->read(std::span(buffer_).subspan(end_), 1, [self = shared_from_this()](std::error_code ec, std::size_t n) {
        self->reading_ = false;
        self->was_read(ec, n);
    });
}

void session::was_read(std::error_code ec, std::size_t n) {
    if (state_ >= state::ending) return;
    silence_.broken(clock::now());
    end_ += n;
    // What came before the end still counts.
    if (n > 0) take_frames();
    if (ec && state_ < state::ending) close();
}

void session::take_frames() {
    guarded([&] {
        while (state_ < state::ending && take_frame()) {
        }
        if (state_ < state::ending && !place_ && !(head_ && payload_.size() > 0)) read();
    });
}

/// Takes the next frame from the buffer; false where more must be read first.
bool session::take_frame() {
    auto const left = [&] { return std::span<std::byte const>(buffer_).subspan(begin_, end_ - begin_); };
    if (!head_) {
        if (left().size() < wire::header_bytes) return false;
        head_ = frames_in_.accept(left().first<wire::header_bytes>());
        begin_ += wire::header_bytes;
        expect_in_turn(head_->type);
    }
    if (head_->type == wire::message::block_data) {
        if (head_->payload_bytes <= data_head_bytes) refuse("a block without bytes");
        if (left().size() < data_head_bytes) return false;
        begin_data(*head_);
        return !place_;
    }
    if (head_->type == wire::message::commit && head_->payload_bytes > wire::most_control_bytes + trainers().digests_bytes())
        refuse("a commit of " + std::to_string(head_->payload_bytes) + " bytes");
    if (left().size() < head_->payload_bytes) {
        if (head_->payload_bytes <= buffer_.size() - wire::header_bytes) return false;
        if (head_->type == wire::message::hello)
            hello_memory_ = core_->lend_for_greeting(head_->payload_bytes);
        else if (head_->type != wire::message::commit)
            refuse(std::to_string(head_->payload_bytes) + " bytes for a message that is never so long");
        payload_.assign(left().begin(), left().end());
        begin_ = end_;
        read_payload();
        return false;
    }
    auto const payload = left().first(head_->payload_bytes);
    begin_ += payload.size();
    auto const type = std::exchange(head_, std::nullopt)->type;
    take_message(type, payload);
    return true;
}

/// Reads a payload larger than the buffer.
void session::read_payload() {
    auto const have = payload_.size(), step = std::min<std::size_t>(step_bytes, head_->payload_bytes - have);
    payload_.resize(have + step);
    reading_ = true;
    stream_->read(std::span(payload_).subspan(have), step, [self = shared_from_this()](std::error_code ec, std::size_t) {
        self->reading_ = false;
        if (self->state_ >= state::ending) return;
        self->silence_.broken(clock::now());
        if (ec) return self->close();
        self->guarded([&] {
            if (self->payload_.size() < self->head_->payload_bytes) return self->read_payload();
            auto const payload = std::exchange(self->payload_, {});
            auto const type = std::exchange(self->head_, std::nullopt)->type;
            self->take_message(type, payload);
            self->hello_memory_ = {};
            self->take_frames();
        });
    });
}

/// Bytes of a block go where they are to stay; those that are in the buffer already are copied there.
void session::begin_data(wire::frame_header const& head) {
    auto const at = std::span<std::byte const>(buffer_).subspan(begin_, data_head_bytes);
    auto const m = wire::decode<wire::block_data>(at);
    begin_ += data_head_bytes;
    place_ = trainers().place_for(m.save, m.image_offset, head.payload_bytes - data_head_bytes);
    placed_ = std::min(place_->bytes().size(), end_ - begin_);
    std::memcpy(place_->bytes().data(), buffer_.data() + begin_, placed_);
    begin_ += placed_;
    read_data();
}

void session::read_data() {
    auto const rest = place_->bytes().subspan(placed_);
    if (rest.empty()) {
        auto const whole = *std::exchange(place_, std::nullopt);
        head_.reset();
        return trainers().arrived(whole);
    }
    // In steps: whoever sends slowly is not silent.
    auto const keep = place_;
    reading_ = true;
    stream_->read(rest, std::min(rest.size(), step_bytes), [self = shared_from_this(), keep](std::error_code ec, std::size_t n) {
        self->reading_ = false;
        if (self->state_ >= state::ending) return;
        self->silence_.broken(clock::now());
        if (ec) return self->close();
        self->placed_ += n;
        self->guarded([&] {
            self->read_data();
            if (!self->place_) self->take_frames();
        });
    });
}

/// Asked of a message's header already: nothing is kept of one that is out of place.
void session::expect_in_turn(wire::message type) const {
    bool const greeting = state_ == state::greeting;
    if (greeting != (type == wire::message::hello)) refuse(greeting ? "HELLO must come first" : "HELLO came before");
    if (state_ == state::attaching && type != wire::message::pong && type != wire::message::goodbye) refuse("a message before WELCOME");
}

void session::take_message(wire::message type, std::span<std::byte const> payload) {
    wire::decode(type, payload, [&](auto&& m) { take(std::move(m)); });
}

held_store& session::trainers() const {
    if (!store_) refuse("a message about a save from somebody who trains nothing");
    return *store_;
}

// ---- what is asked ----

void session::take(wire::hello m) {
    if (m.version != wire::version)
        throw error(errc::mismatch, "the trainer speaks version " + std::to_string(m.version) + " of the protocol, this monitor " +
                                        std::to_string(wire::version) + "; use the same version of varve on both sides");
    auto descriptors = stream_->take_descriptors();
    if (descriptors.size() != m.region_bytes.size())
        refuse(std::to_string(m.region_bytes.size()) + " regions and " + std::to_string(descriptors.size()) + " descriptors");
    state_ = state::attaching;
    purpose_ = m.purpose;
    store_name_ = m.store;
    relayed_ = m.relayed;
    bool const lends = !m.region_bytes.empty();
    auto weak = weak_from_this();
    auto posted = [weak, executor = stream_->executor()](auto call) {
        boost::asio::post(executor, [weak, call = std::move(call)] {
            if (auto self = weak.lock()) call(*self);
        });
    };
    core_->attach(std::move(m), std::move(descriptors), over_network_,
                  {.good =
                       [weak, lends, executor = stream_->executor(), in = core_](std::shared_ptr<held_store> store, wire::welcome const& w) {
                           boost::asio::post(executor, [weak, lends, in, store, w] {
                               auto const self = weak.lock();
                               if (self && self->state_ < state::ending) return self->welcome(store, w, lends);
                               if (store) in->detach(store, false);
                           });
                       },
                   .refused = [posted](error const& e) { posted([e](session& self) { self.fail(e); }); },
                   .tell = [posted](notice n) { posted([n = std::move(n)](session& self) { std::visit([&](auto const& m) { self.send(m); }, n); }); },
                   .let_go = [posted] { posted([](session& self) { self.let_go(); }); },
                   .still_there = [weak] { return !weak.expired(); },
                   .who = this,
                   .peer = peer_});
}

void session::welcome(std::shared_ptr<held_store> const& store, wire::welcome const& w, bool lends) {
    state_ = state::serving;
    store_ = store;
    reads_pool_ = store && lends;
    guarded([&] { send(w); });
}

void session::take(wire::fetch const& m) {
    if (purpose_ == wire::purpose::status) refuse("FETCH on a connection for the status");
    // One that is being sent may be there already.
    bool const on_its_way = std::any_of(out_.begin() + (writing_ ? 1 : 0), out_.end(), [](auto const& o) { return !o.descriptors.empty(); });
    if (sending_ || looking_ || on_its_way) refuse("FETCH before the last one was answered");
    looking_ = true;
    auto posted = [weak = weak_from_this(), executor = stream_->executor()](auto call) {
        boost::asio::post(executor, [weak, call = std::move(call)]() mutable {
            auto const self = weak.lock();
            if (!self || self->state_ >= state::ending) return;
            self->looking_ = false;
            self->guarded([&] { call(*self); });
        });
    };
    core_->find(
        store_name_, over_network_, core_->options().peer && !relayed_, store_, m,
        [posted](std::optional<found_image> found) { posted([found = std::move(found)](session& self) mutable { self.answer(std::move(found)); }); },
        [posted](error const& e) { posted([e](session& self) { self.fail(e); }); });
}

void session::answer(std::optional<found_image> found) {
    if (!found) return send(wire::image{});
    wire::image const answer{found->step, found->sequence, found->size_bytes, found->in_memory, found->name};
    if (over_network_) {
        sending_ = std::make_shared<sending>(std::move(found->file), std::move(found->lease), found->in_memory, 0, found->size_bytes);
        return send(answer);
    }
    std::vector<file_descriptor> along;
    along.push_back(std::move(found->file));
    send(answer, std::move(along));
}

void session::take(wire::status const&) { send(wire::status_reply{core_->status()}); }

void session::take(wire::goodbye const&) {
    farewell_ = true;
    close();
}

// ---- writing ----

template <class Message>
void session::send(Message const& m, std::vector<file_descriptor> descriptors) {
    if (state_ >= state::closed || deaf_) return;
    // What waits goes out as one, but for descriptors: they belong to their message's first byte.
    if (out_.empty() || !descriptors.empty() || (out_.size() == 1 && writing_) || !out_.back().descriptors.empty()) out_.emplace_back();
    auto& last = out_.back();
    auto const before = last.bytes.size();
    frames_out_.append(last.bytes, m);
    last.descriptors = std::move(descriptors);
    out_bytes_ += last.bytes.size() - before;
    if (state_ < state::ending && out_bytes_ > most_waiting_bytes + piece_bytes)
        return fail(error(std::make_error_code(std::errc::timed_out), "the peer takes nothing that is sent to it"));
    write();
}

void session::send_next_piece() {
    auto const n = std::min<std::uint64_t>(piece_bytes, sending_->size - sending_->offset);
    if (sending_->in_memory) return send_piece(bytes_of(sending_->file, sending_->offset, n));
    looking_ = true;
    core_->read_from_disk([weak = weak_from_this(), executor = stream_->executor(), from = sending_, n] {
        auto piece = bytes_of(from->file, from->offset, n);
        boost::asio::post(executor, [weak, piece = std::move(piece)] {
            auto const self = weak.lock();
            if (!self) return;
            self->looking_ = false;
            if (self->sending_) self->guarded([&] { self->send_piece(piece); });
        });
    });
}

void session::send_piece(std::vector<std::byte> const& piece) {
    if (piece.empty()) return fail(error(std::make_error_code(std::errc::io_error), "the checkpoint cannot be read"));
    wire::image_data const m{sending_->offset, piece};
    sending_->offset += piece.size();
    if (sending_->offset == sending_->size) sending_.reset();
    send(m);
}

void session::write() {
    if (writing_ || state_ >= state::closed || deaf_) return;
    if (out_.empty()) {
        if (state_ == state::ending) return close();
        if (sending_ && !looking_) guarded([&] { send_next_piece(); });
        return;
    }
    writing_ = true;
    auto const& first = out_.front();
    std::vector<int> descriptors;
    for (auto const& d : first.descriptors) descriptors.push_back(d.get());
    std::span<std::byte const> const bytes = first.bytes;
    stream_->write(
        std::span(&bytes, 1),
        [self = shared_from_this()](std::error_code ec, std::size_t) {
            self->writing_ = false;
            self->out_bytes_ -= self->out_.front().bytes.size();
            self->out_.pop_front();
            // So says a socket whose other end is closed.
            if (ec == std::errc::broken_pipe || ec == std::errc::connection_reset) return self->cannot_be_heard();
            if (ec) return self->close();
            self->write();
        },
        std::move(descriptors));
}

/// Whoever takes nothing any more, because it was killed say, may have said more than was read: a COMMIT counts.
void session::cannot_be_heard() {
    deaf_ = true;
    out_.clear();
    out_bytes_ = 0;
    sending_.reset();
    if (state_ >= state::ending) return close();
    close_in(last_words_limit);
}

// ---- ending ----

template <class Call>
void session::guarded(Call call) noexcept try {
    call();
} catch (error const& e) {
    fail(e);
} catch (std::exception const& e) {
    fail(cannot_go_on(e));
}

/// The reason goes out, then the connection ends; what a trainer has handed over whole is committed.
void session::fail(error const& why) {
    if (state_ >= state::ending) return;
    core_->log(peer_ + ": " + why.what());
    if (deaf_) return close();
    sending_.reset();
    state_ = state::ending;
    try {
        send(wire::refusal{why.code(), why.what()});
    } catch (std::exception const&) {
        return close();
    }
    if (store_) core_->detach(std::exchange(store_, nullptr), false);
    close_in(farewell_limit);
    write();
}

/// A trainer that sees the connection end may fill its blocks again: where it lent some, that is once they are read no more.
void session::close() {
    if (state_ == state::closed) return;
    state_ = reads_pool_ ? state::ending : state::closed;
    if (store_) core_->detach(std::exchange(store_, nullptr), farewell_);
    if (reads_pool_) return;
    timer_.cancel();
    stream_->close();
    core_->ended(this);
}

/// Whatever is under way by then; and no tick comes before.
void session::close_in(std::chrono::milliseconds limit) {
    timer_.expires_after(limit);
    timer_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
        if (!ec) self->close();
    });
}

void session::let_go() {
    reads_pool_ = false;
    if (state_ != state::ending) return;
    if (out_.empty()) return close();
    close_in(farewell_limit);
}

void session::tick() {
    if (state_ >= state::ending || deaf_) return;
    auto const& o = core_->options();
    auto const age = age_.lasted(clock::now(), period_), silent = silence_.lasted(clock::now(), period_);
    if (state_ == state::greeting && age >= o.hello_limit)
        return fail(error(std::make_error_code(std::errc::timed_out), "no HELLO within " + std::to_string(o.hello_limit.count()) + " ms"));
    if (state_ != state::greeting) {
        // A Unix socket ends with its process: one that says nothing may be in a debugger's hands.
        if (over_network_ && silent >= o.silence_limit)
            return fail(
                error(std::make_error_code(std::errc::timed_out), "nothing was heard for " + std::to_string(o.silence_limit.count()) + " ms"));
        if (auto const now = clock::now(); now - pinged_ >= o.ping_every) {
            pinged_ = now;
            guarded([&] { send(wire::ping{}); });
        }
    }
    if (state_ >= state::ending) return;
    // Of what is waited for, so that a stop of this process is a part of it and not the whole (see silence).
    auto const quarter = [](std::chrono::milliseconds of) { return std::max<clock::duration>(of / 4, std::chrono::milliseconds(1)); };
    period_ = std::min<clock::duration>(o.ping_every, quarter(o.silence_limit));
    if (state_ == state::greeting) period_ = std::min({period_, quarter(o.hello_limit), o.hello_limit - age});
    timer_.expires_after(period_);
    timer_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
        if (!ec) self->tick();
    });
}

}  // namespace varve::asio::server
