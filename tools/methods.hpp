#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "varve/checkpointer_options.hpp"
#include "varve/observer.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"
#include "varve/ticket.hpp"

namespace varve::libtorch {
class training_state;
}

namespace varve::tool {

/// A monitor that owns the store in the method's place.
struct monitor_use {
    std::string address;                      ///< unix:PATH or tcp:HOST:PORT
    std::string store;                        ///< what the monitor calls the store: its path, over TCP a name
    std::string certificate, key, authority;  ///< PEM files; empty: TCP on loopback alone
    std::function<void()> respawn;            ///< starts another monitor where none can be reached; may be empty
};

/// What a method is built from; sizes in bytes, 0 for the method's own default.
struct method_settings {
    std::filesystem::path dir;       ///< the store, for methods that write files
    std::string made_by = "varve";   ///< what the store's mark says
    unsigned num_threads = 8;        ///< writer threads, queue depth, digest workers (at most the cores)
    std::size_t max_async = 4;       ///< N
    std::uint64_t buffer_bytes = 0;  ///< --buffer-size-mb
    std::uint64_t batch_bytes = 0;   ///< --batch-size-mb
    std::uint64_t pool_bytes = 0;    ///< --pool-size-mb; 0: default_pool_bytes; never above a quarter of the usable memory
    std::size_t snapshots = 2;       ///< saves put aside in GPU memory at once, at most; for trainings on a GPU
    when_busy busy = when_busy::block;
    std::size_t keep = 2;
    std::uint64_t keep_every = 0;  ///< 0: off
    prepare_mode prepare = prepare_mode::write;
    bool wait_for_preparation = false;  ///< bench: slots are written before the clock starts; elsewhere in the background
    bool fresh = false;                 ///< start over: the store may be empty or, with overwrite, hold another run
    bool overwrite = false;
    bool measure_waits = false;        ///< GPU time in waits goes into stalls(), where there is a GPU
    bool durable_traditional = false;  ///< set by the entry `traditional-durable`
    observer_list observers;
    std::shared_ptr<monitor_use const> monitor;     ///< null: none; for entries that take one
    std::chrono::milliseconds durable_interval{0};  ///< with one; 0: as often as the disk takes a save
};

/// Where a staging pool is to be.
enum class pool_place { host, gpu, monitor };

/// The pool where no size is asked for: one image; for a GPU 256 MiB; with a monitor two images, or three with `replace`, so that
/// the newest stays there while the next one comes. An image's bytes are rounded up to whole blocks by the caller.
inline std::uint64_t default_pool_bytes(std::uint64_t image_bytes, pool_place place, when_busy busy) {
    if (place == pool_place::gpu) return std::uint64_t{256} << 20;
    if (place == pool_place::host) return image_bytes;
    return (busy == when_busy::replace ? 3 : 2) * image_bytes;
}

/// What took effect, for the result's `config`.
struct method_facts {
    std::string combination;         ///< "host+layerwise+io_uring", after any fall-back: what ran
    std::string sink;                ///< sink::describe()
    std::string staging;             ///< the staging's describe(), if it has one
    std::uint64_t device_bytes = 0;  ///< GPU memory that it takes
    std::uint64_t image_bytes = 0;   ///< of one checkpoint; for the torch archive the bytes of its tensors
    std::uint64_t pool_bytes = 0;
    std::uint64_t block_bytes = 0;
    std::size_t max_in_flight = 1;  ///< N in effect
    std::size_t writing_at_once = 1;
    unsigned writer_threads = 0;
    unsigned digest_workers = 0;
};

/// A strategy whose type is erased: the one loop of varve::checkpointer, with the same rules. Not thread-safe.
class running_method {
public:
    virtual ~running_method() = default;

    virtual bool updates_by_layer() const = 0;  ///< whether layers should be updated one by one on a step with a save
    virtual bool waits_at_seal() const = 0;     ///< whether seal waits for the copies, or for the disk
    virtual ticket begin(std::uint64_t step) = 0;
    virtual void before_update() = 0;
    virtual void before_update_of(std::size_t first, std::size_t last) = 0;
    virtual void layers_ready(std::size_t first, std::size_t last) = 0;
    virtual ticket seal(metadata_map metadata) = 0;
    virtual void drain() = 0;  ///< waits until no save is in flight
    virtual stall_times stalls() const = 0;
    virtual method_facts facts() const = 0;

    /// Restores the newest whole checkpoint, or the one of `step`, into the state; nothing if there is none at all.
    virtual std::optional<restored_checkpoint> restore(std::optional<std::uint64_t> step, restore_options const& options) = 0;
    /// Path of the newest committed checkpoint; empty for methods without files.
    virtual std::filesystem::path newest_path() const = 0;
};

/// A method that `--methods` names.
struct method_entry {
    std::string name;            ///< "layerwise", or a combination such as "host+async+posix"
    std::string result_key;      ///< its key in `results`
    std::string description;     ///< one line for --list
    std::string missing;         ///< why it cannot run in this build or on this machine; empty if it can
    bool writes_files = true;    ///< false: null and memory sinks; `train` refuses these
    bool takes_monitor = false;  ///< whether a monitor can own its store
    bool needs_monitor = false;  ///< it is a comparison's "with the monitor"
    std::function<std::unique_ptr<running_method>(libtorch::training_state&, method_settings)> start;

    /// Whether it runs with one; `asked`: settings::wants_monitor().
    bool has_monitor(bool asked) const { return needs_monitor || (takes_monitor && asked); }
};

/// Every method and combination that the tool knows, the documented ones first ("none" is the trainer's own: no entry).
std::vector<method_entry> const& methods();

/// The entry of that name; throws usage_error with what there is, or with why it cannot run here.
method_entry const& runnable_method(std::string_view name);

}  // namespace varve::tool
