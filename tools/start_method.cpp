#include "start_method.hpp"

#include <algorithm>
#include <thread>
#include <utility>

#include "build_config.hpp"
#include "errors.hpp"
#include "machine.hpp"
#include "strategy.hpp"
#include "varve/checkpointer.hpp"
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
#include "varve/cuda/shared_memory.hpp"
#include "varve/gds/sink.hpp"
#include "varve/gds/staging.hpp"
#endif
#include "varve/torch/archive.hpp"
#include "varve/torch/training_state.hpp"

namespace varve::tool {
namespace {

unsigned digest_workers(method_settings const& s) { return std::clamp(s.num_threads, 1u, std::max(1u, std::thread::hardware_concurrency())); }

std::uint64_t largest_pool_bytes() { return usable_memory_bytes() / 4; }

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

/// Where no size is asked for, in whole blocks.
std::uint64_t usual_pool_bytes(method_settings const& s, std::uint64_t image_bytes, std::uint64_t block_bytes, pool_place place) {
    return default_pool_bytes((image_bytes + block_bytes - 1) / block_bytes * block_bytes, place, s.busy);
}

std::uint64_t wanted_pool_bytes(method_settings const& s, std::uint64_t image_bytes, std::uint64_t block_bytes, pool_place place) {
    return s.pool_bytes != 0 ? s.pool_bytes : usual_pool_bytes(s, image_bytes, block_bytes, place);
}

/// Puts the parts together: the block's size follows from the sink and --buffer-size-mb, the pool's from the image and where it
/// is to be. Blocks for a GPU are no smaller than 8 MiB, so that the copies run at the bus's rate, and no larger than they
/// must be: --batch-size-mb is then many blocks, which are copied, hashed and written side by side.
template <class Staging, class Scheduling, class Sink>
std::unique_ptr<running_method> start_with(libtorch::training_state& training, method_settings const& s, Scheduling scheduling, Sink sink,
                                           method_facts facts, std::size_t writing_at_once) {
    constexpr bool by_layer = Scheduling::copies == copy_moment::at_layer_ready;
    constexpr bool for_gpu = Staging::memory != memory_kind::host;
    std::uint64_t const best_bytes = sink.limits().best_block_bytes;
    auto const block_bytes = block_bytes_of(s, by_layer, for_gpu ? std::max(best_bytes, std::uint64_t{8} << 20) : best_bytes);
    auto image_bytes = safetensors{}.lay_out(training.state()).size_bytes;
    auto const pool_bytes = wanted_pool_bytes(s, image_bytes, block_bytes, for_gpu ? pool_place::gpu : pool_place::host);
    auto staging =
        make_staging<Staging>(Staging::memory == memory_kind::device ? pool_bytes : std::min(pool_bytes, largest_pool_bytes()), block_bytes, s);
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
/// Memory for the staging's pool that a monitor on this machine has too.
template <class Staging>
std::shared_ptr<asio::shared_pool> pool_to_share(std::uint64_t pool_bytes, std::uint64_t block_bytes) {
#if VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS
    if constexpr (Staging::memory == memory_kind::device) {
        auto memory = std::make_shared<cuda::shared_memory>(pool_bytes, block_bytes);
        std::vector<asio::shared_pool::region> regions;
        for (auto& r : memory->regions()) regions.push_back({r.memory, std::move(r.descriptor)});
        auto const device = memory->device();
        return std::make_shared<asio::shared_pool>(std::move(regions), block_bytes, device, std::move(memory));
    }
#endif
    return std::make_shared<asio::shared_pool>(pool_bytes, block_bytes);
}

/// The same, though a run of this store that was killed may have its pool in the GPU's memory still: its monitor lets go of that once
/// all that is crash-safe is committed, and welcomes whoever asks for a checkpoint only then.
template <class Staging>
std::shared_ptr<asio::shared_pool> pool_after_last_run(std::uint64_t pool_bytes, std::uint64_t block_bytes, asio::address const& monitor,
                                                       std::string const& store) {
    try {
        return pool_to_share<Staging>(pool_bytes, block_bytes);
    } catch (error const& e) {
        if (Staging::memory != memory_kind::device || e.code() != std::errc::not_enough_memory) throw;
    }
    try {
        constexpr std::uint64_t no_step = 0;
        asio::monitor_sink(monitor, store).fetch(no_step, 0);
    } catch (error const&) {
        // To be told by the greeting.
    }
    return pool_to_share<Staging>(pool_bytes, block_bytes);
}

/// The same with a monitor in the store's place. The pool is memory that a monitor on this machine sees too.
template <class Staging, class Scheduling>
std::unique_ptr<running_method> start_with_monitor(libtorch::training_state& training, method_settings const& s, Scheduling scheduling,
                                                   method_facts facts, std::size_t writing_at_once) {
    constexpr bool by_layer = Scheduling::copies == copy_moment::at_layer_ready;
    constexpr bool for_gpu = Staging::memory != memory_kind::host, on_gpu = Staging::memory == memory_kind::device;
    auto const where = asio::parse_address(s.monitor->address);
    auto const image_bytes = safetensors{}.lay_out(training.state()).size_bytes;
    // Every block from a GPU interrupts a processor and goes through two messages; a small image has eight all the same.
    auto largest_bytes = std::uint64_t{for_gpu ? 32u : 8u} << 20;
    if (s.pool_bytes != 0) largest_bytes = std::clamp<std::uint64_t>(s.pool_bytes / 4 / block_unit_bytes * block_unit_bytes, 8u << 20, largest_bytes);
    auto const block_bytes =
        block_bytes_of(s, by_layer, std::clamp<std::uint64_t>(image_bytes / 8 / block_unit_bytes * block_unit_bytes, 8u << 20, largest_bytes));
    auto pool_bytes = wanted_pool_bytes(s, image_bytes, block_bytes, pool_place::monitor);
    if (!on_gpu) pool_bytes = std::min(pool_bytes, largest_pool_bytes());
    // That is three images: one is held back, or written, and one is the newest, while the next comes.
    if (auto const least_bytes = usual_pool_bytes(s, image_bytes, block_bytes, pool_place::monitor);
        s.durable_interval.count() > 0 && where.is_unix() && pool_bytes < least_bytes)
        throw usage_error("--durable-interval takes room for three checkpoints in the pool, --pool-size-mb " +
                          std::to_string(least_bytes / 1'000'000 + 1) + "; here it has " + std::to_string(pool_bytes / 1'000'000) + " MB" +
                          (s.pool_bytes == 0 ? ", a quarter of the memory" : ""));
    asio::monitor_sink_options sink_options;
    sink_options.files = store_options_of(s);
    sink_options.respawn = s.monitor->respawn;
    sink_options.durable_interval = s.durable_interval;
    if (!s.monitor->certificate.empty()) sink_options.tls = asio::load_tls({s.monitor->certificate, s.monitor->key, s.monitor->authority}, false);
    if (where.is_unix()) sink_options.pool = pool_after_last_run<Staging>(pool_bytes, block_bytes, where, s.monitor->store);
    auto staging = [&] {
        auto const& pool = sink_options.pool;
        if (!pool) return make_staging<Staging>(pool_bytes, block_bytes, s);
        if constexpr (for_gpu)
            return Staging(pool->memory(), block_bytes, pool, {.snapshots = s.snapshots, .measure_waits = s.measure_waits});
        else
            return Staging(pool->memory(), block_bytes, pool);
    }();
    facts.writing_at_once = 1;  // by the monitor, however many are on their way to it
    facts.digest_workers = digest_workers(s);
    using strategy_type = strategy<checkpointer<Staging, Scheduling, asio::monitor_sink>>;
    auto out = std::make_unique<strategy_type>(by_layer, std::move(facts), training.state(), std::move(staging), scheduling,
                                               asio::monitor_sink(where, s.monitor->store, std::move(sink_options)),
                                               checkpointer_options_of(s, writing_at_once));
    if (where.is_unix()) out->monitors_store(s.monitor->store);
    return out;
}
#endif

template <class Staging>
std::string name_of_staging() {
    return Staging::memory == memory_kind::device ? "gds" : Staging::memory == memory_kind::pinned ? "pinned" : "host";
}

#if VARVE_TOOL_WITH_ASIO
template <class Staging>
std::unique_ptr<running_method> start_staging_with_monitor(libtorch::training_state& training, method_settings const& s, std::string_view scheduling,
                                                           bool all_write) {
    method_facts facts;
    facts.combination = name_of_staging<Staging>() + "+" + std::string(scheduling) + "+monitor";
    auto const n = std::max<std::size_t>(1, s.max_async);
    if (scheduling == "sync") return start_with_monitor<Staging>(training, s, sync{}, std::move(facts), 1);
    if (scheduling == "async") return start_with_monitor<Staging>(training, s, async<dynamic>(n), std::move(facts), all_write ? n : 1);
    return start_with_monitor<Staging>(training, s, layerwise<dynamic>(n), std::move(facts), 1);
}
#endif

template <class Staging, class Sink>
std::unique_ptr<running_method> start_staging(libtorch::training_state& training, method_settings const& s, std::string_view scheduling, Sink sink,
                                              std::string const& sink_name, bool all_write) {
#if VARVE_TOOL_WITH_ASIO
    if constexpr (file_sink<Sink>)
        if (s.monitor) return start_staging_with_monitor<Staging>(training, s, scheduling, all_write);
#endif
    method_facts facts;
    facts.combination = name_of_staging<Staging>() + "+" + std::string(scheduling) + "+" + sink_name;
    facts.writer_threads = sink_name == "posix" || sink_name == "cufile" ? std::max(1u, s.num_threads) : 0;
    auto const n = std::max<std::size_t>(1, s.max_async);
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
#endif

}  // namespace

#if VARVE_TOOL_WITH_POSIX
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
    return std::make_unique<strategy<checkpointer_type>>(false, std::move(facts), training.state(), host_staging(block_unit_bytes, block_unit_bytes),
                                                         sync{}, posix::sink({.writer_threads = 1, .direct = posix::direct_io::never}), s.dir,
                                                         std::move(files), checkpointer_options_of(s, 1), libtorch::archive(training));
}

std::unique_ptr<running_method> start_original(libtorch::training_state& training, method_settings const& s) {
    return start_scheduling(training, s, "", "async", posix_sink(s), "posix", true);
}
#endif

std::unique_ptr<running_method> start_combination(libtorch::training_state& training, method_settings const& s, std::string const& staging,
                                                  std::string const& scheduling, std::string const& sink) {
#if VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS
    if (staging == "gds" && sink == "null") return start_staging<gds::staging>(training, s, scheduling, null_sink{}, sink, false);
#if VARVE_TOOL_WITH_ASIO
    if (staging == "gds" && s.monitor) return start_staging_with_monitor<gds::staging>(training, s, scheduling, false);
#endif
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

}  // namespace varve::tool
