#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

#include "varve/detail/aligned_bytes.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/detail/thread_name.hpp"
#include "varve/error.hpp"
#include "varve/slot.hpp"
#include "varve/system.hpp"

namespace varve::detail {

/// The files of a store that hold no checkpoint. Thread-safe; one background thread writes new ones once.
class slot_pool {
public:
    /// `slot_bytes` is 0 for formats without a fixed size: slots are then made empty and not kept.
    slot_pool(int folder, std::uint64_t slot_bytes, prepare_mode mode, system_calls& calls)
        : folder_(folder), slot_bytes_(slot_bytes), mode_(slot_bytes == 0 ? prepare_mode::none : mode), calls_(calls) {}

    std::uint64_t slot_bytes() const noexcept { return slot_bytes_; }

    /// A name that no file of the folder has.
    std::string new_name() {
        std::lock_guard lock(mutex_);
        return std::string(partial_prefix) + std::to_string(next_number_++);
    }
    void reserve_name(std::string const& name) {
        std::uint64_t number = 0;
        for (char c : name.substr(partial_prefix.size())) {
            if (c < '0' || c > '9' || number > 1'000'000'000'000) return;
            number = number * 10 + static_cast<std::uint64_t>(c - '0');
        }
        std::lock_guard lock(mutex_);
        next_number_ = std::max(next_number_, number + 1);
    }

    /// Makes a new file and allocates it; on failure nothing is left behind and error is thrown.
    slot make() {
        slot made{new_name(), false};
        file_descriptor fd(calls_.openat(folder_, made.name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0666), calls_);
        if (!fd) throw_if(last_system_error(errno), "cannot create a checkpoint file");
        if (mode_ == prepare_mode::none) return made;
        if (uninterrupted([&] { return calls_.fallocate(fd.get(), 0, static_cast<off_t>(slot_bytes_)); }) != 0 && errno != EOPNOTSUPP) {
            auto ec = last_system_error(errno);
            fd.reset();
            calls_.unlinkat(folder_, made.name.c_str());
            throw error(ec, "no room for a checkpoint file of " + std::to_string(slot_bytes_) + " bytes: " + ec.message() +
                                "; free some space or keep fewer checkpoints");
        }
        return made;
    }

    /// Whether nobody else can see the file's bytes: it has one name and nobody has it open or mapped.
    /// Source: fcntl(2), "Leases": a write lease is refused while any other descriptor of the file is open.
    bool is_ours_alone(std::string const& name) {
        file_descriptor fd(calls_.openat(folder_, name.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK, 0), calls_);
        struct stat info{};
        if (!fd || calls_.fstat(fd.get(), &info) != 0 || info.st_nlink != 1) return false;
        if (calls_.setlease(fd.get(), F_WRLCK) != 0) return false;
        calls_.setlease(fd.get(), F_UNLCK);
        return true;
    }

    /// Takes a file as a free slot if its bytes are ours alone and its size fits; unlinks it otherwise. A symbolic link is
    /// never followed: its file is somebody else's.
    void adopt(std::string const& name, bool written) {
        struct stat info{};
        file_descriptor fd(calls_.openat(folder_, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0), calls_);
        bool fits = slot_bytes_ != 0 && fd && calls_.fstat(fd.get(), &info) == 0 && S_ISREG(info.st_mode) &&
                    static_cast<std::uint64_t>(info.st_size) == slot_bytes_;
        fd.reset();
        if (fits && is_ours_alone(name))
            put({name, written});
        else
            calls_.unlinkat(folder_, name.c_str());
    }

    void put(slot s) {
        {
            std::lock_guard lock(mutex_);
            free_.push_back(std::move(s));
        }
        changed_.notify_all();
    }

    std::size_t free_count() const {
        std::lock_guard lock(mutex_);
        return free_.size() + (preparing_ ? 1 : 0);
    }

    /// A free slot, written ones first; nothing if there is none. Takes one from the background thread if need be.
    std::optional<slot> take() {
        std::unique_lock lock(mutex_);
        if (free_.empty() && preparing_) {
            interrupt_ = true;
            ++takers_;
            changed_.wait(lock, [&] { return !preparing_; });
            --takers_;
        }
        if (free_.empty()) return std::nullopt;
        auto it = std::find_if(free_.begin(), free_.end(), [](slot const& s) { return s.written; });
        if (it == free_.end()) it = free_.begin();
        slot taken = std::move(*it);
        free_.erase(it);
        lock.unlock();
        changed_.notify_all();
        return taken;
    }

    /// Unlinks free slots until at most `count` are left.
    void shrink(std::size_t count) {
        std::lock_guard lock(mutex_);
        while (free_.size() > count) {
            calls_.unlinkat(folder_, free_.back().name.c_str());
            free_.pop_back();
        }
    }

    /// Writes every free slot once that was not, in the background.
    void prepare_in_background() {
        if (mode_ == prepare_mode::write)
            worker_ = std::jthread([this](std::stop_token stop) {
                name_this_thread("varve-prepare");
                prepare_loop(stop);
            });
    }

    /// Waits until every free slot is written or has failed to be.
    void wait_until_prepared() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !worker_.joinable() || (!preparing_ && next_unwritten() == free_.end()); });
    }

private:
    std::vector<slot>::iterator next_unwritten() {
        return std::find_if(free_.begin(), free_.end(), [](slot const& s) { return !s.written; });
    }

    void prepare_loop(std::stop_token stop) {
        std::unique_lock lock(mutex_);
        for (;;) {
            auto it = free_.end();
            if (!changed_.wait(lock, stop, [&] { return takers_ == 0 && (it = next_unwritten()) != free_.end(); }) || stop.stop_requested()) return;
            slot mine = std::move(*it);
            free_.erase(it);
            preparing_ = true;
            lock.unlock();
            bool gone_well = write_once(mine.name, stop);
            lock.lock();
            // A slot that cannot be written counts as written here, so that it is not tried for ever: its save says why.
            mine.written = gone_well || !interrupt_;
            preparing_ = interrupt_ = false;
            try {
                free_.push_back(std::move(mine));
            } catch (std::bad_alloc const&) {
                // The next save makes another.
                calls_.unlinkat(folder_, mine.name.c_str());
            }
            lock.unlock();
            changed_.notify_all();
            lock.lock();
        }
    }

    bool write_once(std::string const& name, std::stop_token stop) try {
        constexpr std::size_t piece_bytes = 4u << 20;
        file_descriptor fd(calls_.openat(folder_, name.c_str(), O_WRONLY | O_DIRECT, 0), calls_);
        if (!fd) fd = file_descriptor(calls_.openat(folder_, name.c_str(), O_WRONLY, 0), calls_);
        if (!fd) return false;
        aligned_bytes zeros(piece_bytes);
        std::fill_n(zeros.data(), zeros.size(), std::byte{0});
        auto whole = slot_bytes_ / aligned_bytes::alignment * aligned_bytes::alignment;
        for (std::uint64_t at = 0; at < whole;) {
            if (stop.stop_requested() || is_interrupted()) return false;
            auto n = calls_.pwrite(fd.get(), zeros.data(), std::min<std::uint64_t>(piece_bytes, whole - at), static_cast<off_t>(at));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return false;
            at += static_cast<std::uint64_t>(n);
        }
        return calls_.fdatasync(fd.get()) == 0;
    } catch (std::bad_alloc const&) {
        return false;
    }

    bool is_interrupted() const {
        std::lock_guard lock(mutex_);
        return interrupt_;
    }

    int const folder_;
    std::uint64_t const slot_bytes_;
    prepare_mode const mode_;
    system_calls& calls_;
    mutable std::mutex mutex_;
    std::condition_variable_any changed_;
    std::vector<slot> free_;
    std::uint64_t next_number_ = 0;
    bool preparing_ = false;
    bool interrupt_ = false;
    std::size_t takers_ = 0;  ///< that wait for the slot under preparation
    std::jthread worker_;
};

}  // namespace varve::detail
