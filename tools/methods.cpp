#include "methods.hpp"

#include <algorithm>
#include <array>
#include <fstream>
#include <thread>
#include <type_traits>
#include <unistd.h>
#include <utility>

#include "build_config.hpp"
#include "errors.hpp"
#include "varve/checkpointer.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/scheduling/layerwise.hpp"
#include "varve/scheduling/sync.hpp"
#include "varve/sink/memory.hpp"
#include "varve/sink/null.hpp"
#include "varve/staging/host.hpp"
#if VARVE_TOOL_WITH_POSIX
#include "varve/posix/sink.hpp"
#endif
#if VARVE_TOOL_WITH_URING
#include "varve/uring/sink.hpp"
#endif
#if VARVE_TOOL_WITH_ASIO
#include "varve/asio/monitor_sink.hpp"
#include "varve/asio/sink.hpp"
#endif
#if VARVE_TOOL_WITH_CUDA
#include "varve/cuda/pinned_staging.hpp"
#include "varve/cuda/transfer.hpp"
#include "varve/torch/cuda_stream.hpp"
#endif
#if VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS
#include "varve/gds/sink.hpp"
#include "varve/gds/staging.hpp"
#endif
#if VARVE_TOOL_WITH_TORCH
#include "varve/torch/archive.hpp"
#include "varve/torch/training_state.hpp"
#endif

namespace varve::tool {
namespace {

#if VARVE_TOOL_WITH_TORCH

unsigned digest_workers(method_settings const& s) { return std::clamp(s.num_threads, 1u, std::max(1u, std::thread::hardware_concurrency())); }

/// A quarter of the memory that this process may use: the machine's, or what its control group allows.
std::uint64_t largest_pool_bytes() {
    auto usable = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    std::ifstream limit("/sys/fs/cgroup/memory.max");
    if (std::uint64_t bytes = 0; limit >> bytes) usable = std::min(usable, bytes);
    return usable / 4;
}

store_options store_options_of(method_settings const& s) {
    store_options o;
    o.keep = s.keep;
    o.keep_every = s.keep_every;
    o.prepare = s.prepare;
    o.wait_until_prepared = s.wait_for_preparation;
    o.fresh = s.fresh;
    o.overwrite = s.overwrite;
    o.durable = s.durable_traditional;
    o.workers = digest_workers(s);
    o.made_by = s.made_by;
    return o;
}

checkpointer_options checkpointer_options_of(method_settings const& s, std::size_t writing_at_once) {
    checkpointer_options o;
    o.busy = s.busy;
    o.writing_at_once = writing_at_once;
    if (s.batch_bytes != 0) o.batch_bytes = s.batch_bytes;
    o.digest_workers = digest_workers(s);
    o.observers = s.observers;
    return o;
}

/// What orders a save against the training, which is in LibTorch's current stream.
template <class Order>
Order current_order() {
#if VARVE_TOOL_WITH_CUDA
    if constexpr (std::is_same_v<Order, cuda::stream_order>) return {libtorch::current_stream()};
#endif
    return {};
}

/// The newest checkpoint in a folder that somebody else writes; empty if there is none.
std::filesystem::path newest_in(std::filesystem::path const& folder) {
    std::filesystem::path newest;
    std::uint64_t sequence = 0;
    safetensors const format;
    std::error_code ignored;
    for (auto const& entry : std::filesystem::directory_iterator(folder, ignored)) {
        if (!detail::step_of_name(entry.path().filename().string(), format.extension())) continue;
        file_descriptor fd(::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC), system_calls::kernel());
        if (!fd) continue;
        try {
            auto const found = format.identify(fd.get());
            if (found.sequence > sequence) newest = entry.path();
            sequence = std::max(sequence, found.sequence);
        } catch (error const&) {
        }
    }
    return newest;
}

/// A checkpointer behind running_method.
template <class Checkpointer>
class strategy final : public running_method {
public:
    template <class... Args>
    strategy(bool by_layer, method_facts facts, Args&&... args) : by_layer_(by_layer), facts_(std::move(facts)), ck_(std::forward<Args>(args)...) {
        facts_.sink = ck_.describe_sink();
        facts_.image_bytes = ck_.image_bytes();
        facts_.pool_bytes = ck_.pool_bytes();
        facts_.block_bytes = Checkpointer::streams ? 0 : ck_.block_bytes();
        facts_.max_in_flight = ck_.max_in_flight();
        if constexpr (requires { ck_.staging().describe(); }) {
            if (!Checkpointer::streams) facts_.staging = ck_.staging().describe();
            facts_.device_bytes = ck_.staging().snapshot_bytes();
            if constexpr (requires { ck_.staging().gpu_bytes(); }) facts_.device_bytes = ck_.staging().gpu_bytes();
        }
    }

    bool updates_by_layer() const override { return by_layer_; }
    bool waits_at_seal() const override { return Checkpointer::waits_at_seal; }
    ticket begin(std::uint64_t step) override { return ck_.begin(step); }
    void before_update() override { ck_.before_update_all(order()); }
    void before_update_of(std::size_t first, std::size_t last) override { ck_.before_update_of(first, last, order()); }
    void layers_ready(std::size_t first, std::size_t last) override { ck_.layers_ready(first, last, order()); }
    ticket seal(metadata_map metadata) override { return ck_.seal(std::move(metadata), order()); }
    void drain() override { ck_.drain(); }
    stall_times stalls() const override { return ck_.stalls(); }
    method_facts facts() const override { return facts_; }

    std::optional<restored_checkpoint> restore(std::optional<std::uint64_t> step, restore_options const& options) override {
        if constexpr (requires { ck_.restore(step, options); })
            return ck_.restore(step, options, order());
        else
            return std::nullopt;
    }

    std::filesystem::path newest_path() const override {
        if constexpr (requires { ck_.files(); }) {
            auto saved = ck_.files().checkpoints();
            if (!saved.empty()) return ck_.files().path() / saved.front().name;
        } else {
            return newest_in(monitors_store_);
        }
        return {};
    }

    /// The folder that a monitor on this machine writes.
    void monitors_store(std::filesystem::path folder) { monitors_store_ = std::move(folder); }

private:
    static auto order() { return current_order<typename Checkpointer::order_type>(); }

    bool by_layer_;
    std::filesystem::path monitors_store_;
    method_facts facts_;
    mutable Checkpointer ck_;
};

template <class Staging>
Staging make_staging(std::uint64_t pool_bytes, std::uint64_t block_bytes, [[maybe_unused]] method_settings const& s) {
    if constexpr (Staging::memory != memory_kind::host)
        return Staging(pool_bytes, block_bytes, {.snapshots = s.snapshots, .measure_waits = s.measure_waits});
    else
        return Staging(pool_bytes, block_bytes);
}

/// The best size, or less: a layerwise save hands blocks on after --buffer-size-mb at the latest.
std::uint64_t block_bytes_of(method_settings const& s, bool by_layer, std::uint64_t best_bytes) {
    if (!by_layer || s.buffer_bytes == 0) return best_bytes;
    return std::clamp<std::uint64_t>(s.buffer_bytes / block_unit_bytes * block_unit_bytes, block_unit_bytes, best_bytes);
}

/// Puts the parts together: the block's size follows from the sink and --buffer-size-mb, the pool's from the image; pools for a
/// GPU are 256 MiB. Blocks there are no smaller than 8 MiB, so that the copies run at the bus's rate, and no larger than they
/// must be: --batch-size-mb is then many blocks, which are copied, hashed and written side by side.
template <class Staging, class Scheduling, class Sink>
std::unique_ptr<running_method> start_with(libtorch::training_state& training, method_settings const& s, Scheduling scheduling, Sink sink,
                                           method_facts facts, std::size_t writing_at_once) {
    constexpr bool by_layer = Scheduling::copies == copy_moment::at_layer_ready;
    constexpr bool for_gpu = Staging::memory != memory_kind::host;
    std::uint64_t const best_bytes = sink.limits().best_block_bytes;
    auto const block_bytes = block_bytes_of(s, by_layer, for_gpu ? std::max(best_bytes, std::uint64_t{8} << 20) : best_bytes);
    auto image_bytes = safetensors{}.lay_out(training.state()).size_bytes;
    auto pool_bytes = s.pool_bytes != 0 ? s.pool_bytes : for_gpu ? std::uint64_t{256} << 20 : (image_bytes + block_bytes - 1) / block_bytes * block_bytes;
    auto staging = make_staging<Staging>(Staging::memory == memory_kind::device ? pool_bytes : std::min(pool_bytes, largest_pool_bytes()), block_bytes, s);
    facts.writing_at_once = writing_at_once;
    facts.digest_workers = digest_workers(s);
    using checkpointer_type = checkpointer<Staging, Scheduling, Sink>;
    auto options = checkpointer_options_of(s, writing_at_once);
    if constexpr (file_sink<Sink>) {
        auto files = store_options_of(s);
        files.durable = true;
        return std::make_unique<strategy<checkpointer_type>>(by_layer, std::move(facts), training.state(), std::move(staging), scheduling,
                                                             std::move(sink), s.dir, std::move(files), std::move(options));
    } else {
        return std::make_unique<strategy<checkpointer_type>>(by_layer, std::move(facts), training.state(), std::move(staging), scheduling,
                                                             std::move(sink), std::move(options));
    }
}

#if VARVE_TOOL_WITH_ASIO
/// The same with a monitor in the store's place. The pool is memory that a monitor on this machine sees too; it holds two images,
/// or three with `replace`, so that the newest stays there while the next one comes.
template <class Staging, class Scheduling>
std::unique_ptr<running_method> start_with_monitor(libtorch::training_state& training, method_settings const& s, Scheduling scheduling, method_facts facts,
                                                   std::size_t writing_at_once) {
    constexpr bool by_layer = Scheduling::copies == copy_moment::at_layer_ready;
    [[maybe_unused]] constexpr bool pinned = Staging::memory == memory_kind::pinned;  // unused without CUDA
    auto const block_bytes = block_bytes_of(s, by_layer, std::uint64_t{8} << 20);
    auto const image_bytes = safetensors{}.lay_out(training.state()).size_bytes;
    std::uint64_t const images = s.busy == when_busy::replace ? 3 : 2;
    auto const wanted = s.pool_bytes != 0 ? s.pool_bytes : images * ((image_bytes + block_bytes - 1) / block_bytes) * block_bytes;
    auto const pool_bytes = std::min(wanted, largest_pool_bytes());
    auto const where = asio::parse_address(s.monitor->address);
    asio::monitor_sink_options sink_options;
    sink_options.files = store_options_of(s);
    sink_options.respawn = s.monitor->respawn;
    if (!s.monitor->certificate.empty())
        sink_options.tls = asio::load_tls({s.monitor->certificate, s.monitor->key, s.monitor->authority}, false);
    if (where.is_unix()) sink_options.pool = std::make_shared<asio::shared_pool>(pool_bytes, block_bytes);
    auto staging = [&] {
        auto const& pool = sink_options.pool;
#if VARVE_TOOL_WITH_CUDA
        if constexpr (pinned) {
            cuda::pinned_staging_options const options{.snapshots = s.snapshots, .measure_waits = s.measure_waits};
            return pool ? Staging(pool->memory(), block_bytes, pool, options) : Staging(pool_bytes, block_bytes, options);
        } else
#endif
            return pool ? Staging(pool->memory(), block_bytes, pool) : Staging(pool_bytes, block_bytes);
    }();
    facts.writing_at_once = writing_at_once;
    facts.digest_workers = digest_workers(s);
    using strategy_type = strategy<checkpointer<Staging, Scheduling, asio::monitor_sink>>;
    auto out = std::make_unique<strategy_type>(by_layer, std::move(facts), training.state(), std::move(staging), scheduling,
                                               asio::monitor_sink(where, s.monitor->store, std::move(sink_options)), checkpointer_options_of(s, writing_at_once));
    if (where.is_unix()) out->monitors_store(s.monitor->store);
    return out;
}
#endif

template <class Staging, class Sink>
std::unique_ptr<running_method> start_staging(libtorch::training_state& training, method_settings const& s, std::string_view scheduling, Sink sink,
                                              std::string const& sink_name, bool all_write) {
    method_facts facts;
    constexpr auto memory = Staging::memory;
    facts.combination = std::string(memory == memory_kind::device ? "gds+" : memory == memory_kind::pinned ? "pinned+" : "host+") +
                        std::string(scheduling) + "+" + sink_name;
    facts.writer_threads = sink_name == "posix" || sink_name == "cufile" ? std::max(1u, s.num_threads) : 0;
    auto n = std::max<std::size_t>(1, s.max_async);
#if VARVE_TOOL_WITH_ASIO
    if constexpr (file_sink<Sink> && Staging::memory != memory_kind::device) {
        if (s.monitor) {
            facts.combination = facts.combination.substr(0, facts.combination.rfind('+')) + "+monitor";
            facts.writer_threads = 0;
            if (scheduling == "sync") return start_with_monitor<Staging>(training, s, sync{}, std::move(facts), 1);
            if (scheduling == "async") return start_with_monitor<Staging>(training, s, async<dynamic>(n), std::move(facts), all_write ? n : 1);
            return start_with_monitor<Staging>(training, s, layerwise<dynamic>(n), std::move(facts), 1);
        }
    }
#endif
    if (scheduling == "sync") return start_with<Staging>(training, s, sync{}, std::move(sink), std::move(facts), 1);
    if (scheduling == "async") return start_with<Staging>(training, s, async<dynamic>(n), std::move(sink), std::move(facts), all_write ? n : 1);
    return start_with<Staging>(training, s, layerwise<dynamic>(n), std::move(sink), std::move(facts), 1);
}

/// `staging` is host or pinned; empty for what suits the state: pinned where it lies in GPU memory.
template <class Sink>
std::unique_ptr<running_method> start_scheduling(libtorch::training_state& training, method_settings const& s, std::string_view staging,
                                                 std::string_view scheduling, Sink sink, std::string const& sink_name, bool all_write = false) {
    bool const on_gpu = training.state().in_device_memory();
    if (staging == "host" && on_gpu) throw usage_error("host staging cannot read GPU memory; take pinned, or --device cpu");
#if VARVE_TOOL_WITH_CUDA
    if (staging == "pinned" || (staging.empty() && on_gpu))
        return start_staging<cuda::pinned_staging>(training, s, scheduling, std::move(sink), sink_name, all_write);
#endif
    return start_staging<host_staging>(training, s, scheduling, std::move(sink), sink_name, all_write);
}

#if VARVE_TOOL_WITH_POSIX
posix::sink posix_sink(method_settings const& s) { return posix::sink({.writer_threads = std::max(1u, s.num_threads)}); }

/// torch.save: one thread, through the page cache, everything stops.
std::unique_ptr<running_method> start_traditional(libtorch::training_state& training, method_settings const& s, bool durable) {
    auto files = store_options_of(s);
    files.durable = durable;
    files.prepare = prepare_mode::none;
    method_facts facts;
    facts.combination = "host+sync+posix, torch archive";
    facts.writer_threads = 1;
#if VARVE_TOOL_WITH_CUDA
    if (training.state().in_device_memory()) {
        facts.combination = "pinned+sync+posix, torch archive";
        using on_gpu_type = checkpointer<cuda::pinned_staging, sync, posix::sink, libtorch::archive>;
        return std::make_unique<strategy<on_gpu_type>>(
            false, std::move(facts), training.state(), cuda::pinned_staging(block_unit_bytes, block_unit_bytes), sync{},
            posix::sink({.writer_threads = 1, .direct = posix::direct_io::never}), s.dir, std::move(files), checkpointer_options_of(s, 1),
            libtorch::archive(training, std::make_shared<cuda::transfer>(libtorch::current_stream())));
    }
#endif
    using checkpointer_type = checkpointer<host_staging, sync, posix::sink, libtorch::archive>;
    return std::make_unique<strategy<checkpointer_type>>(
        false, std::move(facts), training.state(), host_staging(block_unit_bytes, block_unit_bytes), sync{},
        posix::sink({.writer_threads = 1, .direct = posix::direct_io::never}), s.dir, std::move(files), checkpointer_options_of(s, 1),
        libtorch::archive(training));
}
#endif

std::unique_ptr<running_method> start_combination(libtorch::training_state& training, method_settings const& s, std::string const& staging,
                                                  std::string const& scheduling, std::string const& sink) {
#if VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS
    if (staging == "gds" && sink == "null") return start_staging<gds::staging>(training, s, scheduling, null_sink{}, sink, false);
    if (staging == "gds") {
        // Asked only now: cuFile's driver and the GPU's context stay with the process that asks.
        if (auto why = gds::sink::available()) throw usage_error("gds+" + scheduling + "+" + sink + ": cuFile does not start here: " + why.message());
        return start_staging<gds::staging>(training, s, scheduling, gds::sink({.writer_threads = std::max(1u, s.num_threads)}), sink, false);
    }
#endif
    if (sink == "null") return start_scheduling(training, s, staging, scheduling, null_sink{}, sink);
    if (sink == "memory") return start_scheduling(training, s, staging, scheduling, memory_sink{}, sink);
#if VARVE_TOOL_WITH_URING
    // posix takes over only where the ring itself is refused; the facts say what ran.
    if (sink == "io_uring" && !uring::sink::available())
        return start_scheduling(training, s, staging, scheduling, uring::sink({.queue_depth = std::max(1u, s.num_threads)}), sink);
#endif
#if VARVE_TOOL_WITH_ASIO
    if (sink == "asio") return start_scheduling(training, s, staging, scheduling, asio::sink({.queue_depth = std::max(1u, s.num_threads)}), sink);
#endif
#if VARVE_TOOL_WITH_POSIX
    return start_scheduling(training, s, staging, scheduling, posix_sink(s), "posix");
#else
    throw usage_error(sink + ": not built");
#endif
}

#endif  // VARVE_TOOL_WITH_TORCH

/// Why the part cannot run in this build or here; empty if it can.
std::string missing_part(std::string const& part) {
    if (part == "pinned" && !VARVE_TOOL_WITH_CUDA) return "pinned staging needs a GPU backend, which this varve does not have";
#if VARVE_TOOL_WITH_CUDA
    if (int gpus = 0; part == "pinned" && (cuda::code_of(::cudaGetDeviceCount(&gpus)) || gpus == 0)) return "pinned staging needs a GPU, and there is none here";
#endif
    if (part == "gds" && !(VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS)) return "GPUDirect staging needs a GPU backend, which this varve does not have";
#if VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS
    if (int gpus = 0; part == "gds" && (cuda::code_of(::cudaGetDeviceCount(&gpus)) || gpus == 0)) return "GPUDirect staging needs a GPU, and there is none here";
#endif
    if (part == "asio" && !VARVE_TOOL_WITH_ASIO) return "built without Boost.Asio; install Boost 1.78 or newer and liburing, and build again";
#if VARVE_TOOL_WITH_ASIO
    if (part == "asio") {
        static auto const refused = asio::sink::available();  // asked once: it sets up a ring
        if (refused) return "the kernel refuses io_uring here, which Boost.Asio's files need: " + refused.message();
    }
#endif
    if (part == "posix" && !VARVE_TOOL_WITH_POSIX) return "built without the posix backend";
    if (part == "io_uring" && !VARVE_TOOL_WITH_URING) return "built without io_uring; install liburing and build again";
#if VARVE_TOOL_WITH_URING && !VARVE_TOOL_WITH_POSIX
    if (part == "io_uring" && uring::sink::available()) return "the kernel refuses io_uring here";
#endif
    return {};
}

/// `suits` says that the staging is whatever suits the state.
method_entry combination(std::string const& staging, std::string const& scheduling, std::string const& sink, bool suits = false) {
    method_entry e;
    e.name = e.result_key = staging + "+" + scheduling + "+" + sink;
    e.description = staging + " staging, " + scheduling + " scheduling, " + sink + " sink";
    e.missing = missing_part(staging);
    if (e.missing.empty() && staging == "gds" && sink != "cufile" && sink != "null")
        e.missing = "the sink " + sink + " does not take GPU memory; take gds+" + scheduling + "+cufile, which writes files, or gds+" + scheduling + "+null";
    if (e.missing.empty()) e.missing = missing_part(sink);
    e.writes_files = sink != "null" && sink != "memory";
    e.takes_monitor = e.writes_files && staging != "gds" && VARVE_TOOL_WITH_ASIO;
#if VARVE_TOOL_WITH_TORCH
    e.start = [staging = suits ? std::string() : staging, scheduling, sink](libtorch::training_state& training, method_settings s) {
        return start_combination(training, s, staging, scheduling, sink);
    };
#else
    if (e.missing.empty()) e.missing = "built without LibTorch; install torch and build again";
#endif
    return e;
}

std::vector<method_entry> make_methods() {
    std::vector<method_entry> all;
    auto documented = [&](std::string name, std::string key, std::string description, method_entry like) {
        like.name = std::move(name);
        like.result_key = std::move(key);
        like.description = std::move(description);
        all.push_back(std::move(like));
        return &all.back();
    };
    auto const posix = combination("host", "sync", "posix");
    [[maybe_unused]] auto* traditional =
        documented("traditional", "Traditional PyTorch Checkpoint", "torch.save: one thread, into the page cache, everything stops", posix);
    traditional->takes_monitor = false;
#if VARVE_TOOL_WITH_TORCH && VARVE_TOOL_WITH_POSIX
    traditional->start = [](libtorch::training_state& t, method_settings s) { return start_traditional(t, s, s.durable_traditional); };
#endif
    [[maybe_unused]] auto* durable =
        documented("traditional-durable", "Traditional PyTorch Checkpoint (durable)", "the same with fsync and rename", posix);
    durable->takes_monitor = false;
#if VARVE_TOOL_WITH_TORCH && VARVE_TOOL_WITH_POSIX
    durable->start = [](libtorch::training_state& t, method_settings s) { return start_traditional(t, s, true); };
#endif
    [[maybe_unused]] auto* original = documented("original", "Original PCCheck", "PCcheck: N checkpoints in flight, N+1 slots, N writing at once",
                                                 combination("host", "async", "posix"));
#if VARVE_TOOL_WITH_TORCH && VARVE_TOOL_WITH_POSIX
    original->start = [](libtorch::training_state& t, method_settings s) { return start_scheduling(t, s, "", "async", posix_sink(s), "posix", true); };
#endif
    documented("layerwise", "Layerwise PCCheck (Improved)", "each layer leaves as the optimizer updates it", combination("host", "layerwise", "io_uring", true));
    // What --use-monitor does to the two, as methods of their own: a comparison has them side by side.
    for (std::size_t i : {2, 3}) {
        auto with = all[i];
        with.name += "-monitor";
        with.result_key = with.result_key + ", monitor";
        with.description += "; a monitor owns the store";
        with.needs_monitor = true;
        if (!with.takes_monitor && with.missing.empty()) with.missing = "the monitor is not built: it needs the backend asio (Boost 1.78 or newer, and liburing)";
        all.push_back(std::move(with));
    }
    for (std::string staging : {"host", "pinned", "gds"})
        for (std::string scheduling : {"sync", "async", "layerwise"})
            for (std::string sink : {"null", "memory", "posix", "io_uring", "asio", "cufile"})
                if (sink != "cufile" || staging == "gds") all.push_back(combination(staging, scheduling, sink));
    return all;
}

}  // namespace

std::vector<method_entry> const& methods() {
    static auto const all = make_methods();
    return all;
}

method_entry const& runnable_method(std::string_view name) {
    for (auto const& m : methods()) {
        if (m.name != name) continue;
        if (!m.missing.empty()) throw usage_error("method " + m.name + ": " + m.missing);
        return m;
    }
    throw usage_error("unknown method '" + std::string(name) + "'; see varve bench --list");
}

}  // namespace varve::tool
