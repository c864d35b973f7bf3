#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/broken_file.hpp"
#include "varve/detail/restore_file.hpp"
#include "varve/detail/slot_pool.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/error.hpp"
#include "varve/slot.hpp"
#include "varve/state.hpp"
#include "varve/system.hpp"

namespace varve {

struct store_options {
    std::size_t in_flight = 1;     ///< N: slots beside those of the kept checkpoints
    std::size_t keep = 2;          ///< K: the last K checkpoints by sequence, at least 1; files for the next 1,024 are made at the start
    std::uint64_t keep_every = 0;  ///< checkpoints of every M-th step stay for ever; 0: none
    prepare_mode prepare = prepare_mode::write;
    bool wait_until_prepared = false;  ///< the constructor returns when every slot was written once
    bool fresh = false;                ///< start over; refused with errc::mismatch where there are checkpoints, but for `overwrite`
    bool overwrite = false;            ///< let go what is there, of whatever run, after the first commit
    bool durable = true;               ///< false: commits rename and sync nothing (torch.save as users call it); for formats that stream
    unsigned workers = 2;              ///< threads that read and hash when the store opens
    std::string made_by = "varve";     ///< for the mark of a new store
    system_calls* calls = nullptr;     ///< nullptr: the kernel's
};

/// A checkpoint in a store.
struct stored_checkpoint {
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    std::string name;
};

/// A file that carries a checkpoint's name and is not whole.
struct broken_checkpoint {
    std::string name;
    std::string why;
};

/// A checkpoint that was read back into the state.
struct restored_checkpoint {
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    std::filesystem::path path;
    metadata_map metadata;
};

/// A folder of checkpoints: naming, slots, commit, retention, recovery. One writer at a time; thread-safe.
///
/// What was committed survives a crash at any point: a checkpoint is renamed only when its bytes are durable, and let go
/// only when a newer one is. Source: varve/format/README.md, "A store".
class store {
public:
    /// Opens the store at `path`, made if it is not there. `slot_bytes` is the size of every checkpoint, 0 where the
    /// format has none. Throws error: errc::not_a_store, store_locked, mismatch (another format, model or optimizer),
    /// or the system's, such as std::errc::no_space_on_device.
    store(std::filesystem::path const& path, file_format const& format, state const& s, std::uint64_t slot_bytes, store_options options = {})
        : options_(std::move(options)), calls_(options_.calls ? *options_.calls : system_calls::kernel()), format_(format),
          folder_(path, options_.made_by, calls_), slots_(folder_.get(), slot_bytes, options_.prepare, calls_) {
        options_.keep = std::max<std::size_t>(1, options_.keep);
        options_.in_flight = std::max<std::size_t>(1, options_.in_flight);
        find_checkpoints(s);
        adopt_partials();
        fill_slots();
        slots_.prepare_in_background();
        if (options_.wait_until_prepared) slots_.wait_until_prepared();
    }

    /// The folder's descriptor, open as long as the store.
    int folder() const noexcept { return folder_.get(); }
    std::filesystem::path const& path() const noexcept { return folder_.path(); }

    /// The checkpoints that count, newest first by sequence.
    std::vector<stored_checkpoint> checkpoints() const {
        std::lock_guard lock(mutex_);
        return {checkpoints_.rbegin(), checkpoints_.rend()};
    }

    /// Files that carry a checkpoint's name and were found not to be whole.
    std::vector<broken_checkpoint> broken() const {
        std::lock_guard lock(mutex_);
        return broken_;
    }

    // ---- saving: acquire, then commit or give_back ----

    /// A file to write; made anew if no free one is left. Throws error with the system's code, such as
    /// std::errc::no_space_on_device.
    slot acquire() {
        if (auto s = slots_.take()) return *std::move(s);
        try {
            return slots_.make();
        } catch (error const& e) {
            if (!no_room(e)) throw;
            {
                // After a crash in a commit more than the last K are there: the others give way now, not with the next commit.
                std::lock_guard lock(mutex_);
                if (!previous_run_.empty()) throw;
                let_go_locked();
            }
            if (auto s = slots_.take()) return *std::move(s);
            return slots_.make();
        }
    }

    /// One above any sequence in the store.
    std::uint64_t next_sequence() const {
        std::lock_guard lock(mutex_);
        return highest_sequence_ + 1;
    }

    /// Renames a slot whose bytes are durable to the checkpoint of that step, makes the name durable, and only then
    /// lets go what is no longer kept. Returns the system's error; nothing was let go then.
    std::error_code commit(slot s, std::uint64_t step, std::uint64_t sequence) {
        auto name = detail::checkpoint_name(step, format_.extension());
        std::lock_guard lock(mutex_);
        if (calls_.renameat(folder_.get(), s.name.c_str(), name.c_str()) != 0) {
            auto ec = last_system_error(errno);
            give_back(std::move(s), ec);
            return ec;
        }
        std::erase_if(checkpoints_, [&](auto const& c) { return c.name == name; });
        std::erase_if(previous_run_, [&](auto const& n) { return n == name; });
        std::erase_if(broken_, [&](auto const& b) { return b.name == name; });
        highest_sequence_ = std::max(highest_sequence_, sequence);
        if (options_.durable) {
            if (auto ec = folder_.sync()) {
                // The name may be on disk or not, so it counts as neither a checkpoint nor a slot.
                return ec;
            }
        }
        checkpoints_.push_back({step, sequence, name});
        let_go_locked();
        return {};
    }

    /// Returns a slot that was not committed, for that reason. A file that the disk could not write, or after a failed sync, is not
    /// used again: the next save gets another.
    void give_back(slot s, std::error_code why, bool synced = true) {
        bool const broken = !synced || why == std::errc::io_error || why == std::errc::no_such_file_or_directory;
        if (!broken && slots_.slot_bytes() != 0)
            slots_.put(std::move(s));
        else
            calls_.unlinkat(folder_.get(), s.name.c_str());
    }

    // ---- restoring ----

    /// Reads the newest whole checkpoint, or the one of `step`, into the state; nothing if the store has none.
    ///
    /// A checkpoint that turns out not to be whole is reported by broken() and the one before it is taken. Throws
    /// errc::mismatch for another model, and errc::no_checkpoint, the tensors being undefined, when none is left.
    std::optional<restored_checkpoint> restore(state& s, std::optional<std::uint64_t> step, restore_options const& options) {
        bool touched = false;
        for (std::vector<stored_checkpoint> candidates = candidates_for(step); !candidates.empty();) {
            auto const candidate = std::move(candidates.front());
            candidates.erase(candidates.begin());
            try {
                auto fd = open(candidate.name);
                auto identity = detail::restore_file(format_, fd.get(), s, options, touched);
                // Let go meanwhile, its file may have been written again: without digests nobody has seen that.
                if (!options.check_digests && !counts(candidate)) {
                    candidates = candidates_for(step);
                    continue;
                }
                touched = true;
                if (s.restored) s.restored();
                return restored_checkpoint{identity.step, identity.sequence, path() / candidate.name, identity.metadata};
            } catch (error const& e) {
                if (!counts(candidate)) {
                    // Let go since it was looked up, by a save that was in flight, which is newer.
                    candidates = candidates_for(step);
                    continue;
                }
                if (!detail::tells_of_the_file(e.code())) throw error(e.code(), e.what() + detail::undefined_if(touched));
                std::lock_guard lock(mutex_);
                broken_.push_back({candidate.name, e.what()});
                std::erase_if(checkpoints_, [&](auto const& c) { return c.name == candidate.name; });
            }
        }
        if (step)
            throw error(errc::no_checkpoint,
                        path().string() + ": no whole checkpoint of step " + std::to_string(*step) + detail::undefined_if(touched));
        auto lost = broken();
        if (lost.empty()) return std::nullopt;
        throw error(errc::no_checkpoint,
                    path().string() + ": no whole checkpoint is left" + detail::undefined_if(touched) + "; last: " + lost.back().why);
    }

private:
    static constexpr std::size_t most_made_ahead = 1024;  ///< files for checkpoints that are yet to come: K may stand for all of them

    std::vector<stored_checkpoint> candidates_for(std::optional<std::uint64_t> step) const {
        auto candidates = checkpoints();
        if (step) std::erase_if(candidates, [&](auto const& c) { return c.step != *step; });
        return candidates;
    }
    bool counts(stored_checkpoint const& c) const {
        std::lock_guard lock(mutex_);
        return std::any_of(checkpoints_.begin(), checkpoints_.end(),
                           [&](auto const& other) { return other.name == c.name && other.sequence == c.sequence; });
    }

    file_descriptor open(std::string const& name) {
        file_descriptor fd(calls_.openat(folder_.get(), name.c_str(), O_RDONLY | O_NONBLOCK, 0), calls_);
        if (!fd) throw_if(last_system_error(errno), (path() / name).string());
        return fd;
    }

    /// Finds what is whole: of the newest K every byte is read, of older ones the structure.
    void find_checkpoints(state const& s) {
        std::vector<stored_checkpoint> found;
        std::string other;
        for (auto const& name : detail::names_in(folder_.get())) {
            auto step = detail::step_of_name(name, format_.extension());
            if (!step) {
                if (detail::is_checkpoint_name(name)) other = name;
                continue;
            }
            try {
                auto identity = format_.identify(open(name).get());
                if (identity.sequence > std::numeric_limits<std::uint64_t>::max() / 2)
                    throw error(errc::malformed, name + ": its sequence number is out of range");
                found.push_back({identity.step, identity.sequence, name});
                highest_sequence_ = std::max(highest_sequence_, identity.sequence);
            } catch (error const& e) {
                if (!detail::tells_of_the_file(e.code())) throw;
                broken_.push_back({name, e.what()});
            }
        }
        if (!options_.overwrite) {
            if (!other.empty())
                throw error(errc::mismatch,
                            path().string() + ": holds checkpoints of another format (" + other + "); give another folder or overwrite it");
            if (options_.fresh && !(found.empty() && broken_.empty()))
                throw error(errc::mismatch, path().string() + ": holds " + std::to_string(found.size() + broken_.size()) +
                                                " checkpoints already; continue from them, overwrite them or give another folder");
        }
        std::sort(found.begin(), found.end(), [](auto const& a, auto const& b) { return a.sequence > b.sequence; });
        bool const replace_run = options_.fresh && options_.overwrite;
        file_descriptor newest;
        for (auto const& c : found) {
            try {
                if (checkpoints_.size() < options_.keep) {
                    auto fd = open(c.name);
                    format_.verify(fd.get(), options_.workers);
                    if (checkpoints_.empty()) {
                        if (!replace_run) format_.expect_same_layout(fd.get(), s);
                        newest = std::move(fd);
                    }
                }
                checkpoints_.push_back(c);
            } catch (error const& e) {
                if (e.code() == errc::mismatch)
                    throw error(errc::mismatch, path().string() + ": holds another run: " + e.what() + "; give another folder or overwrite it");
                if (!detail::tells_of_the_file(e.code())) throw;
                broken_.push_back({c.name, e.what()});
            }
        }
        if (newest) make_durable(newest.get());
        std::reverse(checkpoints_.begin(), checkpoints_.end());
        if (!replace_run) return;
        for (auto const& c : checkpoints_) previous_run_.push_back(c.name);
        for (auto const& b : broken_) previous_run_.push_back(b.name);
        for (auto const& name : detail::names_in(folder_.get()))
            if (detail::is_checkpoint_name(name) && !detail::step_of_name(name, format_.extension())) previous_run_.push_back(name);
        checkpoints_.clear();
        broken_.clear();
    }

    void make_durable(int fd) {
        if (!options_.durable) return;
        if (detail::uninterrupted([&] { return calls_.fdatasync(fd); }) != 0)
            throw_if(last_system_error(errno), path().string() + ": cannot make the newest checkpoint durable");
        throw_if(folder_.sync(), path().string() + ": cannot make the newest checkpoint durable");
    }

    void adopt_partials() {
        for (auto const& name : detail::names_in(folder_.get())) {
            if (!name.starts_with(detail::partial_prefix)) continue;
            slots_.reserve_name(name);
            slots_.adopt(name, false);
        }
    }

    /// N files and one for each of the K checkpoints that is yet to come, at most 1,024 of those, so that a save never waits for
    /// one to be let go; what was there before where they do not fit.
    void fill_slots() {
        if (slots_.slot_bytes() == 0) return;
        auto const wanted = wanted_slots();
        slots_.shrink(wanted);
        if (options_.prepare == prepare_mode::none) return;
        auto const before = slots_.free_count();
        try {
            while (slots_.free_count() < wanted) slots_.put(slots_.make());
        } catch (error const& e) {
            // After a crash in a commit one of more than K has a save's place, and gives way to it (see acquire).
            if (no_room(e) && slots_.free_count() + surplus() >= wanted_slots(surplus())) return;
            slots_.shrink(before);
            throw;
        }
    }

    /// Checkpoints that the next commit lets go.
    std::size_t surplus() const {
        if (!previous_run_.empty() || checkpoints_.size() <= options_.keep) return 0;
        auto const last = checkpoints_.end() - static_cast<std::ptrdiff_t>(options_.keep);
        return static_cast<std::size_t>(std::count_if(checkpoints_.begin(), last, [&](auto const& c) { return !is_kept_for_ever(c); }));
    }

    static bool no_room(error const& e) { return e.code() == std::errc::no_space_on_device || e.code() == last_system_error(EDQUOT); }

    /// Once so many of the checkpoints are let go.
    std::size_t wanted_slots(std::size_t let_go = 0) const {
        auto const all = std::count_if(checkpoints_.begin(), checkpoints_.end(), [&](auto const& c) { return !is_kept_for_ever(c); });
        auto const kept = static_cast<std::size_t>(all) - let_go;
        auto const missing = options_.keep - std::min(options_.keep, kept);
        return options_.in_flight + std::min(missing, most_made_ahead);
    }

    bool is_kept_for_ever(stored_checkpoint const& c) const { return options_.keep_every != 0 && c.step % options_.keep_every == 0; }

    /// Lets go all but the last K, those kept for ever, and what another run left: renamed, the renames made durable,
    /// and only then free to be overwritten.
    void let_go_locked() {
        std::vector<std::string> names = std::exchange(previous_run_, {});
        auto last = checkpoints_.size() > options_.keep ? checkpoints_.size() - options_.keep : 0;
        for (std::size_t i = 0; i < last; ++i)
            if (!is_kept_for_ever(checkpoints_[i])) names.push_back(checkpoints_[i].name);
        std::erase_if(checkpoints_, [&](auto const& c) { return std::find(names.begin(), names.end(), c.name) != names.end(); });
        std::vector<std::string> partials;
        for (auto const& name : names) {
            auto partial = slots_.new_name();
            if (calls_.renameat(folder_.get(), name.c_str(), partial.c_str()) == 0) partials.push_back(partial);
        }
        if (partials.empty()) return;
        // Not durable: the old names may come back with a crash, so the files must keep their bytes.
        bool reusable = options_.durable && !folder_.sync();
        for (auto const& partial : partials) {
            if (reusable)
                slots_.adopt(partial, true);
            else
                calls_.unlinkat(folder_.get(), partial.c_str());
        }
    }

    store_options options_;
    system_calls& calls_;
    file_format const& format_;
    detail::store_folder folder_;
    detail::slot_pool slots_;
    mutable std::mutex mutex_;
    std::vector<stored_checkpoint> checkpoints_;  ///< oldest first
    std::vector<broken_checkpoint> broken_;
    std::vector<std::string> previous_run_;
    std::uint64_t highest_sequence_ = 0;
};

}  // namespace varve
