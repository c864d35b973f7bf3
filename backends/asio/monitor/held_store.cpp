#include "held_store.hpp"

#include <nlohmann/json.hpp>

#include "varve/detail/digest.hpp"
#include "varve/detail/text.hpp"
#include "varve/detail/thread_name.hpp"
#include "varve/error.hpp"

namespace varve::asio::server {

namespace {

[[noreturn]] void refuse(std::string const& why) { throw error(errc::malformed, "malformed message: " + why); }

constexpr std::uint64_t most_data = wire::most_checkpoint_bytes;
constexpr std::uint64_t most_block_bytes = wire::most_region_bytes;
constexpr std::size_t most_in_flight = 1024;

/// Saves that may be on their way to here at once, whatever a trainer says.
constexpr std::size_t most_saves = most_in_flight + 16;
/// What their tables may take where the trainer's memory is less.
constexpr std::uint64_t least_for_tables = std::uint64_t{1} << 30;

state state_of(wire::hello const& m) {
    state s;
    s.layers = m.layers;
    s.aliases = m.aliases;
    return s;
}

/// What the header has room for beyond the default, so that the layout is the trainer's.
std::uint64_t metadata_room(wire::hello const& m, state const& s) {
    auto const usual = safetensors().lay_out(s).header_bytes;
    return safetensors::default_metadata_bytes + (m.header_bytes > usual ? m.header_bytes - usual : 0);
}

}  // namespace

void held_store::expect_sense(wire::hello const& m) {
    if (m.extension != ".safetensors")
        throw error(errc::unsupported, "the monitor takes checkpoints in the format .safetensors, not " + varve::detail::printable(m.extension));
    if (m.in_flight == 0 || m.in_flight > most_in_flight || m.keep == 0) refuse("a count that makes no sense");
    if (m.durable_interval_ms > static_cast<std::uint64_t>(wire::longest_interval.count()) ||
        (m.durable_interval_ms > 0 && m.busy != when_busy::replace))
        refuse("an interval of " + std::to_string(m.durable_interval_ms) + " ms between durable saves");
    if (m.block_bytes == 0 || m.block_bytes % digest_chunk_bytes != 0 || m.block_bytes > most_block_bytes)
        refuse("blocks of " + std::to_string(m.block_bytes) + " bytes");
    if (m.image_bytes < m.header_bytes || m.image_bytes - m.header_bytes > most_data)
        refuse("an image of " + std::to_string(m.image_bytes) + " bytes");
    std::uint64_t data = 0;
    for (auto const& l : m.layers)
        for (auto const& t : l.tensors) {
            std::uint64_t bytes = element_bytes(t.type);
            for (auto d : t.shape)
                if (d < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(d), &bytes)) refuse("a tensor of an impossible shape");
            if (bytes > most_data || (data += bytes) > most_data) refuse("tensors larger than any checkpoint");
        }
    if (data != m.image_bytes - m.header_bytes) refuse("the image is not as large as its tensors");
    for (auto bytes : m.region_bytes)
        if (bytes == 0 || bytes > wire::most_region_bytes) refuse("a region of " + std::to_string(bytes) + " bytes");
    if (!m.device.empty() && m.region_bytes.empty()) refuse("a GPU, and no region of its memory");
}

std::uint64_t held_store::wanted_bytes(wire::hello const& m) {
    return (m.in_flight + std::uint64_t{2}) * std::max<std::uint64_t>(m.image_bytes, m.block_bytes);
}

std::uint64_t held_store::device_places_bytes(wire::hello const& m) { return trainer_pool::places * m.block_bytes; }
std::uint64_t held_store::device_bytes(wire::hello const& m) { return device_places_bytes(m) + m.image_bytes; }

held_store::held_store(std::filesystem::path path, wire::hello hello, trainer_pool pool, memory_budget::lease lease, unsigned writes_at_once,
                       system_calls& calls, store_hooks hooks)
    : path_(std::move(path)), hello_(std::move(hello)), by_reference_(!pool.empty()), writes_at_once_(writes_at_once), calls_(calls),
      layout_(state_of(hello_)), format_(metadata_room(hello_, layout_)), image_(format_.lay_out(layout_)), pool_(std::move(pool)),
      lease_(std::move(lease)), hooks_(std::move(hooks)) {
    if (image_.header_bytes != hello_.header_bytes || image_.size_bytes != hello_.image_bytes)
        throw error(errc::mismatch, "the trainer lays its checkpoints out in another way than this monitor: they are of different versions of varve");
    // With less, a block that is kept would be one that the next save waits for.
    std::uint64_t const images = hello_.busy == when_busy::replace ? 3 : 2;
    if (by_reference_) {
        std::uint64_t blocks = 0;
        for (std::size_t i = 0; i < pool_.count(); ++i) {
            blocks += pool_.size_bytes(i) / hello_.block_bytes;
            pool_bytes_ += pool_.size_bytes(i);
        }
        auto const per_image = (image_.size_bytes + hello_.block_bytes - 1) / hello_.block_bytes - image_.header_bytes / hello_.block_bytes;
        keeps_newest_ = blocks >= images * per_image;
    } else {
        keeps_newest_ = lease_.bytes() >= images * image_.size_bytes;
        credit_ = lease_.bytes();
    }
    hasher_ = std::jthread([this](std::stop_token stop) {
        varve::detail::name_this_thread("varve-hash");
        hash_loop(stop);
    });
    thread_ = std::jthread([this] {
        varve::detail::name_this_thread("varve-store");
        run();
    });
}

held_store::~held_store() {
    trainer_gone(false);
    thread_.join();
}

// ---- messages ----

void held_store::take(wire::begin const& m) {
    std::lock_guard lock(mutex_);
    if (last_id_ && m.save <= *last_id_) refuse("the save " + std::to_string(m.save) + " was begun before");
    if (m.step == 0 || m.step > varve::detail::last_step) refuse("a save of step " + std::to_string(m.step));
    // Each has a digest and a mark for every chunk, whatever of it comes.
    auto const chunks = varve::detail::chunk_count(image_.data_bytes());
    auto const most = std::min<std::uint64_t>(most_saves, 1 + std::max(lease_.bytes(), least_for_tables) / (chunks * 9 + 1));
    if (saves_.size() >= most) refuse("too many saves at once");
    last_id_ = m.save;
    saves_.push_back(std::make_shared<held_save>(*this, m.save, m.step, chunks));
}

/// Null for one that has ended here already, which the trainer had no way to know.
held_store::save_ptr held_store::find(std::uint64_t id, char const* message) {
    if (ended_early_.contains(id)) return nullptr;
    for (auto const& s : saves_)
        if (s->id == id && !s->ended_by_trainer) {
            if (s->error) return nullptr;
            return s;
        }
    refuse(std::string(message) + " of the save " + std::to_string(id) + ", which is not under way");
}

held_block& held_store::add_block(held_save& s, std::uint64_t offset, std::size_t size) {
    bool const placed = offset >= image_.header_bytes && (offset - image_.header_bytes) % digest_chunk_bytes == 0 && size > 0 &&
                        size <= hello_.block_bytes && offset <= image_.size_bytes && size <= image_.size_bytes - offset;
    if (!placed || (size % digest_chunk_bytes != 0 && offset + size != image_.size_bytes))
        refuse("a block of " + std::to_string(size) + " bytes at " + std::to_string(offset) + ", where none can be");
    auto const first = (offset - image_.header_bytes) / digest_chunk_bytes, count = varve::detail::chunk_count(size);
    for (auto c = first; c < first + count; ++c)
        if (s.covered[c]) refuse("a block at " + std::to_string(offset) + " that came before");
    std::fill_n(s.covered.begin() + static_cast<std::ptrdiff_t>(first), count, true);
    s.covered_chunks += count;
    auto& b = s.blocks.emplace_back();
    b.save = &s;
    b.offset_bytes = offset;
    b.size_bytes = size;
    return b;
}

void held_store::take(wire::block_ref const& m) {
    std::lock_guard lock(mutex_);
    if (!by_reference_) refuse("a block by reference, and no pool");
    if (m.region >= pool_.count() || m.region_offset > pool_.size_bytes(m.region) || m.size > pool_.size_bytes(m.region) - m.region_offset)
        refuse("a block outside of the pool");
    if (on_loan_.contains({m.region, m.region_offset})) refuse("a block of the pool that is the monitor's already");
    auto const s = find(m.save, "a block");
    if (!s) return tell(wire::release{m.region, m.region_offset});
    auto& b = add_block(*s, m.image_offset, m.size);
    b.region = m.region;
    b.region_offset = m.region_offset;
    if (!pool_.on_device()) b.data = pool_.address(m.region, m.region_offset);
    on_loan_.insert({m.region, m.region_offset});
    ++s->arrived;
    work_.notify_one();
}

held_store::place held_store::place_for(std::uint64_t save, std::uint64_t offset_bytes, std::size_t size_bytes) {
    std::lock_guard lock(mutex_);
    if (by_reference_) refuse("a block as payload beside a pool");
    if (size_bytes > credit_) refuse("more bytes than there is credit for");
    place p;
    p.save = save;
    auto const s = find(save, "a block");
    p.dropped = !s;
    p.memory = memory_.take(size_bytes, credit_ - size_bytes);
    if (s) {
        p.block = s->blocks.size();
        auto& b = add_block(*s, offset_bytes, size_bytes);
        b.own = p.memory;
        b.data = b.own->data();
    }
    credit_ -= size_bytes;
    return p;
}

void held_store::arrived(place const& p) {
    std::lock_guard lock(mutex_);
    for (auto const& s : saves_) {
        if (p.dropped || s->id != p.save) continue;
        auto& b = s->blocks[p.block];
        ++s->arrived;
        if (s->error) return free_if_it_may_go(*s, b), tell_if_over(*s);
        to_hash_.emplace_back(s, &b);
        hash_work_.notify_one();
        work_.notify_one();
        return;
    }
    auto const size = p.memory->size();
    credit_ += size;
    memory_.put(p.memory, credit_);
    tell(wire::credit{size});
}

void held_store::take(wire::commit m) {
    std::lock_guard lock(mutex_);
    auto const s = find(m.save, "a commit");
    if (!s) {
        ended_early_.erase(m.save);
        for (auto const& other : saves_)
            if (other->id == m.save) other->ended_by_trainer = true;
        return;
    }
    if (s->covered_chunks != s->covered.size()) refuse("the commit of a save that lacks bytes");
    if (m.chunk_digests.size() != (by_reference_ ? 0 : s->digests.size()))
        refuse("a commit with " + std::to_string(m.chunk_digests.size()) + " digests");
    s->ended_by_trainer = true;
    s->committed = true;
    s->expected = std::move(m.chunk_digests);
    s->metadata = std::move(m.metadata);
    try {
        format_.expect_fits(s->metadata);
    } catch (error const& e) {
        return end(*s, e.code(), e.what());
    }
    look_if_whole(s);
}

void held_store::take(wire::abandon const& m) {
    std::lock_guard lock(mutex_);
    ended_early_.erase(m.save);
    for (auto const& s : saves_)
        if (s->id == m.save) {
            // What is whole is committed all the same, and answered so.
            bool const unwanted = !std::exchange(s->ended_by_trainer, true);
            if (unwanted && !s->error) end(*s, errc::cancelled, "");
            forget();
            return;
        }
}

void held_store::take(wire::drain const& m) {
    std::lock_guard lock(mutex_);
    draining_ = m.on;
    work_.notify_one();
}

void held_store::trainer_gone(bool keep) {
    std::lock_guard lock(mutex_);
    if (!gone_) {
        gone_ = true;
        keep_ = keep;
        for (auto const& s : saves_) {
            if (s->phase != save_phase::receiving) continue;
            if (s->committed && s->whole() && !s->error) continue;  // its digests are being looked at
            // The block that was under way will not come.
            s->arrived = s->blocks.size();
            if (s->error) {
                free_what_may_go(*s);
                tell_if_over(*s);
                continue;
            }
            ++counts_.discarded;
            end(*s, errc::cancelled, "");
        }
        forget();
    }
    work_.notify_one();
}

bool held_store::has_trainer() const {
    std::lock_guard lock(mutex_);
    return !gone_ && hooks_.still_there();
}

// ---- what becomes of a save ----

void held_store::look_if_whole(save_ptr const& s) {
    if (s->phase != save_phase::receiving || s->error || !s->committed || !s->whole()) return;
    if (!by_reference_) {
        if (s->hashed != s->blocks.size()) return;
        if (s->digests != s->expected)
            return end(*s, errc::not_whole, "bytes of the save of step " + std::to_string(s->step) + " changed on the way to the monitor");
        s->expected = {};
    }
    s->phase = save_phase::crash_safe;
    counts_.crash_safe_step = s->step;
    tell(wire::crash_safe{s->id});
    auto const before = std::exchange(newest_, s);
    if (hello_.busy == when_busy::replace)
        for (auto const& other : saves_)
            if (other != s && other != current_ && other->phase == save_phase::crash_safe && !other->error) {
                ++counts_.replaced;
                end(*other, errc::replaced, "");
            }
    if (before) free_what_may_go(*before);
    forget();
    work_.notify_one();
}

void held_store::end(held_save& s, std::error_code why, std::string text) {
    if (s.error) return;
    s.error = why;
    s.why = std::move(text);
    if (newest_.get() == &s) newest_ = nullptr;
    if (why != errc::cancelled && why != errc::replaced) ++counts_.failed;
    free_what_may_go(s);
    tell_if_over(s);
    work_.notify_one();
}

/// Nobody is left to be told of it, where its trainer has gone; then memory is all that has it, and stays.
void held_store::not_written(held_save& s, std::error_code why, std::string text) {
    if (s.memory_alone) return;
    if (s.error || !gone_ || !keep_ || !keeps_newest_ || newest_.get() != &s) return end(s, why, std::move(text));
    ++counts_.failed;
    s.memory_alone = true;
    s.not_taken = why;
    s.sequence = 0;
    s.why = std::move(text);
    work_.notify_one();
}

void held_store::free_what_may_go(held_save& s) {
    for (auto& b : s.blocks) free_if_it_may_go(s, b);
    if (s.phase == save_phase::durable && s.let_go == s.blocks.size() && newest_.get() != &s) s.phase = save_phase::over;
}

void held_store::free_if_it_may_go(held_save& s, held_block& b) {
    if (b.let_go || b.users > 0) return;
    if (s.error) {
        // One that is still being read comes here again when it has arrived.
        if (&b == &s.blocks.back() && s.arrived < s.blocks.size()) return;
    } else {
        if (!b.written || !b.hashed) return;
        // With the newest kept, what comes next may have to be kept too.
        if (keeps_newest_ && (s.phase == save_phase::receiving || newest_.get() == &s)) return;
    }
    b.let_go = true;
    ++s.let_go;
    if (by_reference_) {
        on_loan_.erase({b.region, b.region_offset});
        tell(wire::release{b.region, b.region_offset});
        return;
    }
    credit_ += b.size_bytes;
    memory_.put(std::move(b.own), credit_);
    tell(wire::credit{b.size_bytes});
}

/// An end is told once nothing of the save is held any more.
void held_store::tell_if_over(held_save& s) {
    if (!s.error || s.phase == save_phase::over || s.let_go != s.blocks.size()) return;
    s.phase = save_phase::over;
    if (!s.ended_by_trainer) ended_early_.insert(s.id);
    s.ended_by_trainer = true;
    tell(wire::failed{s.id, s.error, s.why});
}

void held_store::forget() {
    saves_.remove_if([&](save_ptr const& s) { return s->forgettable() && s != current_ && s != newest_; });
}

void held_store::tell(notice n) {
    if (!gone_) hooks_.tell(std::move(n));
}

std::uint64_t held_store::held_bytes() const {
    std::uint64_t bytes = 0;
    for (auto const& s : saves_)
        for (auto const& b : s->blocks)
            if (!b.let_go) bytes += b.size_bytes;
    return bytes;
}

std::vector<stored_checkpoint> held_store::checkpoints() const {
    std::lock_guard lock(mutex_);
    return open_ ? files_->checkpoints() : std::vector<stored_checkpoint>{};
}

void held_store::describe(nlohmann::json& out) const {
    std::lock_guard lock(mutex_);
    auto const in_flight = std::count_if(saves_.begin(), saves_.end(),
                                         [](auto const& s) { return s->phase == save_phase::receiving || s->phase == save_phase::crash_safe; });
    out["pool_bytes"] = pool_bytes_ > 0 ? pool_bytes_ : lease_.bytes();
    if (!hello_.device.empty()) out["device"] = hello_.device;
    if (hello_.durable_interval_ms > 0 && keeps_newest_) out["durable_interval_sec"] = static_cast<double>(hello_.durable_interval_ms) / 1e3;
    out["held_bytes"] = held_bytes();
    out["in_flight"] = in_flight;
    out["keeps_newest"] = keeps_newest_;
    if (counts_.crash_safe_step > 0) out["crash_safe_step"] = counts_.crash_safe_step;
    if (counts_.durable_step > 0) {
        out["durable_step"] = counts_.durable_step;
        out["durable_sequence"] = counts_.durable_sequence;
    }
    out["durable"] = counts_.durable;
    out["replaced"] = counts_.replaced;
    out["failed"] = counts_.failed;
    out["discarded"] = counts_.discarded;
    out["bytes_written"] = counts_.bytes_written;
    auto const seconds = std::chrono::duration<double>(counts_.writing).count();
    if (seconds > 0) out["write_gb_per_s"] = static_cast<double>(counts_.bytes_written) / seconds / 1e9;
    if (open_) out["writer"] = writer_->describe();
}

}  // namespace varve::asio::server
