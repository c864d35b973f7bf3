#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "varve/asio/wire.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"

#include "file_writer.hpp"
#include "held_save.hpp"
#include "kept_image.hpp"
#include "memory_budget.hpp"
#include "trainer_pool.hpp"

namespace varve::asio::server {

/// What a store has to say to its trainer.
using notice = std::variant<wire::release, wire::credit, wire::crash_safe, wire::durable, wire::failed>;

/// What a store found when it opened.
struct opened_store {
    std::uint64_t durable_step = 0, durable_sequence = 0;
    std::uint64_t credit_bytes = 0;
};

/// Calls on any thread. They do no more than post to somebody else: the store may hold its lock meanwhile.
struct store_hooks {
    std::function<void(opened_store const&)> opened;
    std::function<void(error const&)> not_opened;
    std::function<void(notice)> tell;
    std::function<bool()> still_there;  ///< whether the trainer's connection is; one that ends before `opened` detaches nothing
    std::function<void(std::uint64_t step, std::uint64_t sequence)> became_durable;
    /// Memory on top of what the store has; nothing where there is no room for it. With no lock held.
    std::function<std::optional<memory_budget::lease>(std::uint64_t bytes)> more_memory;
    /// The last call, once the trainer has gone and everything crash-safe is committed: the store is closed.
    std::function<void(std::unique_ptr<kept_image>)> ended;
    std::function<void(std::string const&)> log;  ///< with no lock held
};

/// A store that a trainer fills through the monitor: what was handed over, and the thread that writes and commits it.
///
/// Members but the constructor are thread-safe; those that take a message throw errc::malformed for one that no trainer
/// sends, which ends that trainer's connection and nothing else.
class held_store {
public:
    /// Takes over the pool and the lease on the memory; opens the store on its own thread.
    held_store(std::filesystem::path path, wire::hello hello, trainer_pool pool, memory_budget::lease lease, unsigned writes_at_once,
               system_calls& calls, store_hooks hooks);
    /// As if the trainer had gone; waits for what is crash-safe. Not on its own thread.
    ~held_store();

    void take(wire::begin const& m);
    void take(wire::block_ref const& m);
    void take(wire::commit m);
    void take(wire::abandon const& m);
    void take(wire::drain const& m);

    /// Where the bytes of a BLOCK_DATA are to be read to; then arrived() takes them.
    class place {
    public:
        std::span<std::byte> bytes() const noexcept { return memory->bytes(); }

    private:
        friend class held_store;
        std::uint64_t save = 0;
        std::size_t block = 0;
        bool dropped = false;  ///< of a save that is over already
        std::shared_ptr<varve::detail::aligned_bytes> memory;
    };
    place place_for(std::uint64_t save, std::uint64_t offset_bytes, std::size_t size_bytes);
    void arrived(place const& p);

    /// Its connection has ended. What is not crash-safe is discarded; `keep` the newest in memory for ended().
    void trainer_gone(bool keep);
    bool has_trainer() const;

    std::filesystem::path const& path() const noexcept { return path_; }
    wire::hello const& trained() const noexcept { return hello_; }
    std::uint64_t digests_bytes() const noexcept { return varve::detail::chunk_count(image_.data_bytes()) * sizeof(std::uint64_t); }
    std::vector<stored_checkpoint> checkpoints() const;
    void describe(nlohmann::json& out) const;

    /// Memory of its own that a trainer without a pool gets for its blocks: enough to keep `in_flight` images and one more.
    static std::uint64_t wanted_bytes(wire::hello const& m);
    /// Host memory for a trainer whose pool is in a GPU's: for blocks on their way to the disk; and, with that, to keep its newest
    /// checkpoint in.
    static std::uint64_t device_places_bytes(wire::hello const& m);
    static std::uint64_t device_bytes(wire::hello const& m);
    /// Throws error for a HELLO that makes no sense.
    static void expect_sense(wire::hello const& m);

private:
    using save_ptr = std::shared_ptr<held_save>;

    // With the mutex held.
    save_ptr find(std::uint64_t id, char const* message);
    held_block& add_block(held_save& s, std::uint64_t offset, std::size_t size);
    void look_if_whole(save_ptr const& s);
    void end(held_save& s, std::error_code why, std::string text);
    void not_written(held_save& s, std::error_code why, std::string text);
    void free_what_may_go(held_save& s);
    void free_if_it_may_go(held_save& s, held_block& b);
    void tell_if_over(held_save& s);
    void forget();
    void tell(notice n);
    std::uint64_t held_bytes() const;

    // The writer's thread.
    void run();
    void open();
    bool holds_back() const;
    void try_again_soon();
    save_ptr next_to_write() const;
    bool work_on_current(std::unique_lock<std::mutex>& lock);
    void start_writing(save_ptr const& s, std::unique_lock<std::mutex>& lock);
    void submit_next(std::unique_lock<std::mutex>& lock);
    void finish(std::unique_lock<std::mutex>& lock);
    void discard(std::unique_lock<std::mutex>& lock);
    std::error_code write_and_commit(held_save& s, std::string& why);
    void hash(held_save& s, held_block const& b, std::byte const* data) const;
    bool may_submit(held_save const& s) const noexcept;
    void leave_place(held_block& b);
    static void block_written(void* context, std::error_code ec) noexcept;
    std::unique_ptr<kept_image> keep_in_memory(held_save& s);
    void hash_loop(std::stop_token stop);

    std::filesystem::path const path_;
    wire::hello const hello_;
    bool const by_reference_;
    unsigned const writes_at_once_;
    system_calls& calls_;
    state layout_;
    safetensors format_;
    image image_;
    trainer_pool pool_;
    std::uint64_t pool_bytes_ = 0;  ///< of a pool by reference
    memory_budget::lease lease_;
    store_hooks hooks_;
    bool keeps_newest_ = false;

    std::unique_ptr<file_writer> writer_;
    std::optional<varve::store> files_;

    mutable std::mutex mutex_;
    std::condition_variable work_;
    std::condition_variable_any hash_work_;
    std::list<save_ptr> saves_;  ///< in the order of BEGIN
    save_ptr current_;           ///< being written
    save_ptr newest_;            ///< crash-safe
    std::optional<std::uint64_t> last_id_;
    std::set<std::uint64_t> ended_early_;  ///< saves that are over here while the trainer still sends parts of them
    std::set<std::pair<std::uint32_t, std::uint64_t>> on_loan_;
    std::deque<std::pair<save_ptr, held_block*>> to_hash_;
    block_memory memory_;
    std::uint64_t credit_ = 0;  ///< bytes that the trainer may still send
    bool open_ = false, gone_ = false, keep_ = false;
    bool draining_ = false;                               ///< the trainer waits for what it has saved
    std::chrono::steady_clock::time_point next_write_{};  ///< no sooner, where the trainer wants an interval

    std::chrono::steady_clock::time_point writing_since_;
    struct counts {
        std::uint64_t durable = 0, replaced = 0, failed = 0, discarded = 0, bytes_written = 0;
        std::chrono::nanoseconds writing{};
        std::uint64_t crash_safe_step = 0, durable_step = 0, durable_sequence = 0;
    } counts_;

    std::jthread hasher_;
    std::jthread thread_;
};

}  // namespace varve::asio::server
