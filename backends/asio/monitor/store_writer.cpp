#include "held_store.hpp"

#include <sys/mman.h>
#include <unistd.h>
#include <array>
#include <cerrno>
#include <semaphore>

#include "varve/detail/digest.hpp"
#include "varve/error.hpp"

namespace varve::asio::server {

namespace {

constexpr std::chrono::seconds try_again_after{1};

std::error_code code_of(std::exception const& e) {
    auto const* ours = dynamic_cast<error const*>(&e);
    return ours ? ours->code() : std::make_error_code(std::errc::not_enough_memory);
}

/// Writes and waits.
std::error_code write_now(file_writer::target& to, std::uint64_t offset, std::span<std::byte const> bytes) noexcept {
    struct {
        std::binary_semaphore done{0};
        std::error_code outcome;
    } wait;
    to.write(offset, {bytes.data(), bytes.size()},
             {[](void* context, std::error_code ec) noexcept {
                  auto& w = *static_cast<decltype(wait)*>(context);
                  w.outcome = ec;
                  w.done.release();
              },
              &wait});
    wait.done.acquire();
    return wait.outcome;
}

/// The kernel moves a page that is read for the first time after it was written to those in use, which takes about as long as the
/// copy: here, and not in the restore of a trainer that waits for it.
void read_once(int fd, std::uint64_t size_bytes) noexcept {
    std::array<std::byte, 64u << 10> piece;
    for (std::uint64_t at = 0; at < size_bytes; at += piece.size())
        while (::pread(fd, piece.data(), piece.size(), static_cast<off_t>(at)) < 0 && errno == EINTR) {
        }
}

}  // namespace

void held_store::open() {
    store_options options;
    options.in_flight = 1;  // one save of a store is written at a time
    options.keep = hello_.keep;
    options.keep_every = hello_.keep_every;
    options.prepare = hello_.prepare;
    options.fresh = hello_.fresh;
    options.overwrite = hello_.overwrite;
    options.wait_until_prepared = hello_.wait_until_prepared;
    options.calls = &calls_;
    if (!hello_.made_by.empty()) options.made_by = hello_.made_by;
    writer_ = make_file_writer(writes_at_once_, calls_);
    pool_.open(*writer_);
    files_.emplace(path_, format_, layout_, image_.size_bytes, std::move(options));
}

void held_store::run() {
    std::optional<error> refused;
    try {
        open();
    } catch (error const& e) {
        refused = e;
    } catch (std::exception const& e) {
        refused.emplace(std::make_error_code(std::errc::not_enough_memory), std::string("cannot open the store: ") + e.what());
    }
    if (refused) {
        // What reads a GPU ends on its own thread.
        writer_.reset();
        pool_ = {};
        return hooks_.not_opened(*refused);
    }
    if (hello_.durable_interval_ms > 0 && !keeps_newest_ && hooks_.log)
        hooks_.log(path_.string() + ": no room for three checkpoints in memory: the disk gets what it can take, whatever the interval");
    std::unique_lock lock(mutex_);
    open_ = true;
    opened_store found;
    found.credit_bytes = credit_;
    if (auto const all = files_->checkpoints(); !all.empty()) {
        found.durable_step = counts_.durable_step = all.front().step;
        found.durable_sequence = counts_.durable_sequence = all.front().sequence;
    }
    hooks_.opened(found);
    for (;;) {
        if (work_on_current(lock)) continue;
        bool const held_back = !current_ && holds_back();
        if (!current_) {
            if (auto const s = held_back ? nullptr : next_to_write()) {
                start_writing(s, lock);
                continue;
            }
            // What is left when the trainer has gone is being hashed, or kept for its bytes.
            bool const idle = std::none_of(saves_.begin(), saves_.end(),
                                           [](auto const& s) { return s->phase == save_phase::receiving || s->phase == save_phase::crash_safe; });
            if (gone_ && idle) break;
        }
        forget();
        if (held_back)
            work_.wait_until(lock, next_write_);
        else
            work_.wait(lock);
    }
    lock.unlock();
    hasher_.request_stop();
    hasher_.join();
    std::unique_ptr<kept_image> kept;
    if (keep_ && newest_ && keeps_newest_) {
        kept = keep_in_memory(*newest_);
        if (!kept && hooks_.log) hooks_.log(path_.string() + ": the newest checkpoint is not kept in memory: there is none left");
    }
    lock.lock();
    open_ = false;
    newest_ = nullptr;
    saves_.clear();
    lock.unlock();
    files_.reset();  // and with it the lock
    writer_.reset();
    pool_ = {};
    lock.lock();
    lease_ = {};
    lock.unlock();
    hooks_.ended(std::move(kept));
}

/// Whoever has left, or waits for its saves, has no use for an interval; and where there is no room for another save beside the one
/// that is held back, training would wait.
bool held_store::holds_back() const { return keeps_newest_ && !gone_ && !draining_ && std::chrono::steady_clock::now() < next_write_; }

/// A write that came to nothing does not use up an interval; nor is a disk that fails tried with every save.
void held_store::try_again_soon() { next_write_ = std::min(next_write_, std::chrono::steady_clock::now() + try_again_after); }

/// What is whole comes first, in its order; with `replace` there is but one. Else what is still coming in is written as it comes.
held_store::save_ptr held_store::next_to_write() const {
    for (auto const& s : saves_)
        if (s->phase == save_phase::crash_safe && !s->error) return s;
    for (auto const& s : saves_)
        if (s->phase == save_phase::receiving && !s->error && s->arrived > 0) return s;
    return nullptr;
}

/// Does the next thing for the save that is being written; false where there is none to do.
bool held_store::work_on_current(std::unique_lock<std::mutex>& lock) {
    if (!current_) return false;
    auto& s = *current_;
    if (s.error || s.memory_alone) {
        if (s.in_flight > 0) return false;
        discard(lock);
        return true;
    }
    if (may_submit(s)) {
        submit_next(lock);
        return true;
    }
    if (s.phase != save_phase::crash_safe || s.written != s.blocks.size()) return false;
    finish(lock);
    return true;
}

void held_store::start_writing(save_ptr const& s, std::unique_lock<std::mutex>& lock) {
    current_ = s;
    next_write_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(hello_.durable_interval_ms);
    lock.unlock();
    std::error_code failed;
    std::string why;
    try {
        auto file = files_->acquire();
        s->file = file;
        s->target = writer_->open({files_->folder(), file.name, image_.size_bytes});
    } catch (std::exception const& e) {
        failed = code_of(e);
        why = e.what();
    }
    lock.lock();
    if (failed) not_written(*s, failed, std::move(why));
}

bool held_store::may_submit(held_save const& s) const noexcept {
    return s.submitted < s.arrived && s.in_flight < writer_->queue_depth() && (!pool_.on_device() || pool_.has_place());
}

void held_store::submit_next(std::unique_lock<std::mutex>& lock) {
    auto& s = *current_;
    auto& b = s.blocks[s.submitted++];
    if (s.in_flight++ == 0) writing_since_ = std::chrono::steady_clock::now();
    b.users += by_reference_ ? 2 : 1;
    int const slot = by_reference_ ? pool_.slot(b.region) : unregistered;
    if (pool_.on_device()) b.data = pool_.take_place();
    lock.unlock();
    auto const failed = pool_.on_device() ? pool_.read(b.region, b.region_offset, {b.data, b.size_bytes}) : std::error_code();
    if (failed) {
        block_written(&b, failed);
    } else {
        s.target->write(b.offset_bytes, {b.data, b.size_bytes, memory_kind::host, slot}, {&held_store::block_written, &b});
        if (by_reference_) hash(s, b, b.data);
    }
    lock.lock();
    if (!by_reference_) return;
    --b.users;
    leave_place(b);
    if (!failed) {
        b.hashed = true;
        ++s.hashed;
    }
    free_if_it_may_go(s, b);
    tell_if_over(s);
}

/// A block of a GPU's pool that nothing here reads any more is in that pool alone again. With the mutex held.
void held_store::leave_place(held_block& b) {
    if (!pool_.on_device() || b.users > 0) return;
    pool_.put_place(std::exchange(b.data, nullptr));
}

/// With no lock held: the digests of different blocks are different words.
void held_store::hash(held_save& s, held_block const& b, std::byte const* data) const {
    varve::detail::chunk_digests({data, b.size_bytes}, std::span(s.digests).subspan((b.offset_bytes - image_.header_bytes) / digest_chunk_bytes));
}

void held_store::block_written(void* context, std::error_code ec) noexcept {
    auto& b = *static_cast<held_block*>(context);
    auto& s = *b.save;
    auto& self = *s.store;
    std::lock_guard lock(self.mutex_);
    if (--s.in_flight == 0) self.counts_.writing += std::chrono::steady_clock::now() - self.writing_since_;
    --b.users;
    self.leave_place(b);
    if (ec) {
        self.not_written(s, ec, "cannot write the save of step " + std::to_string(s.step) + ": " + ec.message());
    } else {
        b.written = true;
        ++s.written;
        self.counts_.bytes_written += b.size_bytes;
    }
    self.free_if_it_may_go(s, b);
    self.tell_if_over(s);
    // Woken under the lock: the save may be gone as soon as it is free.
    self.work_.notify_one();
}

void held_store::discard(std::unique_lock<std::mutex>& lock) {
    auto const s = current_;
    lock.unlock();
    s->target.reset();
    if (s->file) files_->give_back(*std::exchange(s->file, std::nullopt), s->memory_alone ? s->not_taken : s->error);
    if (s->memory_alone && hooks_.log) hooks_.log(path_.string() + ": " + s->why);
    lock.lock();
    try_again_soon();
    if (s->memory_alone) s->phase = save_phase::durable;
    tell_if_over(*s);
    current_ = nullptr;
    forget();
}

void held_store::finish(std::unique_lock<std::mutex>& lock) {
    auto const s = current_;
    lock.unlock();
    auto const since = std::chrono::steady_clock::now();
    std::string why;
    auto const outcome = write_and_commit(*s, why);
    lock.lock();
    counts_.writing += std::chrono::steady_clock::now() - since;
    current_ = nullptr;
    if (!outcome) {
        ++counts_.durable;
        counts_.durable_step = s->step;
        counts_.durable_sequence = s->sequence;
        s->phase = save_phase::durable;
        tell(wire::durable{s->id, s->sequence});
        hooks_.became_durable(s->step, s->sequence);
        free_what_may_go(*s);
    } else {
        try_again_soon();
        not_written(*s, outcome, why);
        if (s->memory_alone) s->phase = save_phase::durable;
    }
    forget();
    if (!outcome || !hooks_.log) return;
    lock.unlock();
    hooks_.log(path_.string() + ": " + why);
    lock.lock();
}

std::error_code held_store::write_and_commit(held_save& s, std::string& why) {
    std::error_code outcome;
    bool synced = true;
    try {
        s.sequence = files_->next_sequence();
        s.header = std::make_shared<varve::detail::aligned_bytes>(format_.header(layout_, image_, {s.step, s.sequence, s.metadata}, s.digests));
        outcome = write_now(*s.target, 0, s.header->bytes());
        if (!outcome) {
            outcome = s.target->sync();
            synced = !outcome;
        }
    } catch (std::exception const& e) {
        outcome = code_of(e);
        why = e.what();
    }
    s.target.reset();
    auto file = *std::exchange(s.file, std::nullopt);
    try {
        if (outcome)
            files_->give_back(std::move(file), outcome, synced);
        else
            outcome = files_->commit(std::move(file), s.step, s.sequence);
    } catch (std::exception const& e) {
        if (!outcome) outcome = code_of(e);
    }
    if (outcome && why.empty()) why = "cannot commit the save of step " + std::to_string(s.step) + ": " + outcome.message();
    return outcome;
}

/// Blocks that came as payload are hashed as they come: the trainer's digests say whether they are what it sent.
void held_store::hash_loop(std::stop_token stop) {
    std::unique_lock lock(mutex_);
    for (;;) {
        if (!hash_work_.wait(lock, stop, [&] { return !to_hash_.empty(); })) return;
        auto const [s, b] = std::move(to_hash_.front());
        to_hash_.pop_front();
        if (s->error) continue;
        ++b->users;
        lock.unlock();
        hash(*s, *b, b->data);
        lock.lock();
        --b->users;
        b->hashed = true;
        ++s->hashed;
        look_if_whole(s);
        free_if_it_may_go(*s, *b);
        tell_if_over(*s);
        work_.notify_one();
    }
}

/// Copies a whole save. Out of a trainer's pool that takes memory of its own; blocks that came as payload are freed meanwhile,
/// so that never more is held than before.
std::unique_ptr<kept_image> held_store::keep_in_memory(held_save& s) {
    auto out = std::make_unique<kept_image>();
    if (by_reference_) {
        std::optional<memory_budget::lease> more;
        // Beside a GPU's pool room was left for it.
        if (std::lock_guard lock(mutex_); pool_.on_device() && lease_.bytes() >= device_bytes(hello_)) more = lease_.split(image_.size_bytes);
        if (!more) more = hooks_.more_memory(image_.size_bytes);
        // What stands nowhere else is kept all the same: the pool, which has room for two, is let go in a moment.
        if (std::lock_guard lock(mutex_); !more && s.sequence == 0 && !pool_.on_device()) more = lease_.split(image_.size_bytes);
        if (!more) return nullptr;
        out->lease = std::move(*more);
    }
    out->step = s.step;
    out->durable = s.sequence != 0;
    out->size_bytes = image_.size_bytes;
    out->memory = {::memfd_create("varve-checkpoint", MFD_CLOEXEC | MFD_ALLOW_SEALING), system_calls::kernel()};
    auto put = [&](std::span<std::byte const> bytes, std::uint64_t offset) {
        while (!bytes.empty()) {
            auto const n = ::pwrite(out->memory.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return false;
            bytes = bytes.subspan(static_cast<std::size_t>(n));
            offset += static_cast<std::uint64_t>(n);
        }
        return true;
    };
    try {
        if (!out->memory || ::ftruncate(out->memory.get(), static_cast<off_t>(image_.size_bytes)) != 0) return nullptr;
        // Nothing is being written any more.
        auto* const place = pool_.on_device() ? pool_.take_place() : nullptr;
        for (auto& b : s.blocks) {
            auto const* data = b.data;
            if (place) {
                if (pool_.read(b.region, b.region_offset, {place, b.size_bytes})) return nullptr;
                data = place;
            }
            if (!out->durable && !b.hashed) hash(s, b, data);
            if (!put({data, b.size_bytes}, b.offset_bytes)) return nullptr;
            b.own.reset();
        }
        if (!out->durable) {
            s.sequence = files_->next_sequence();
            s.header = std::make_shared<varve::detail::aligned_bytes>(format_.header(layout_, image_, {s.step, s.sequence, s.metadata}, s.digests));
        }
        out->sequence = s.sequence;
        if (!put(s.header->bytes(), 0)) return nullptr;
    } catch (std::exception const&) {
        return nullptr;
    }
    read_once(out->memory.get(), image_.size_bytes);
    ::fcntl(out->memory.get(), F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    if (by_reference_) return out;
    std::lock_guard lock(mutex_);
    lease_.shrink(image_.size_bytes);
    out->lease = std::move(lease_);
    return out;
}

}  // namespace varve::asio::server
