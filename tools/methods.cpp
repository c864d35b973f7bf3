#include "methods.hpp"

#include <algorithm>
#include <utility>

#include "build_config.hpp"
#include "errors.hpp"
#if VARVE_TOOL_WITH_TORCH
#include "start_method.hpp"
#endif
#if VARVE_TOOL_WITH_URING
#include "varve/uring/sink.hpp"
#endif
#if VARVE_TOOL_WITH_ASIO
#include "varve/asio/sink.hpp"
#endif
#if VARVE_TOOL_WITH_CUDA
#include "varve/cuda/error.hpp"
#endif

namespace varve::tool {
namespace {

/// Why the part cannot run in this build or here; empty if it can. `falls_back`: posix takes over where the kernel refuses rings.
std::string missing_part(std::string const& part, [[maybe_unused]] bool falls_back = false) {
    if (part == "pinned" && !VARVE_TOOL_WITH_CUDA) return "pinned staging needs a GPU backend, which this varve does not have";
#if VARVE_TOOL_WITH_CUDA
    if (int gpus = 0; part == "pinned" && (cuda::code_of(::cudaGetDeviceCount(&gpus)) || gpus == 0))
        return "pinned staging needs a GPU, and there is none here";
#endif
    if (part == "gds" && !(VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS))
        return "GPUDirect staging needs a GPU backend, which this varve does not have";
#if VARVE_TOOL_WITH_CUDA && VARVE_TOOL_WITH_GDS
    if (int gpus = 0; part == "gds" && (cuda::code_of(::cudaGetDeviceCount(&gpus)) || gpus == 0))
        return "GPUDirect staging needs a GPU, and there is none here";
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
#if VARVE_TOOL_WITH_URING
    if (part == "io_uring" && !(falls_back && VARVE_TOOL_WITH_POSIX)) {
        static auto const refused = uring::sink::available();  // asked once: it sets up a ring
        if (refused) return "the kernel refuses io_uring here: " + refused.message() + "; take posix";
    }
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
        e.missing =
            "the sink " + sink + " does not take GPU memory; take gds+" + scheduling + "+cufile, which writes files, or gds+" + scheduling + "+null";
    // What is asked for by its parts runs as that, or not at all.
    if (e.missing.empty()) e.missing = missing_part(sink, suits);
    e.writes_files = sink != "null" && sink != "memory";
    e.takes_monitor = e.writes_files && VARVE_TOOL_WITH_ASIO;
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
    original->start = [](libtorch::training_state& t, method_settings s) { return start_original(t, s); };
#endif
    documented("layerwise", "Layerwise PCCheck (Improved)", "each layer leaves as the optimizer updates it",
               combination("host", "layerwise", "io_uring", true));
    // What --use-monitor does to the two, as methods of their own: a comparison has them side by side.
    for (std::string_view name : {"original", "layerwise"}) {
        auto with = *std::find_if(all.begin(), all.end(), [&](auto const& m) { return m.name == name; });
        with.name += "-monitor";
        with.result_key = with.result_key + ", monitor";
        with.description += "; a monitor owns the store";
        with.needs_monitor = true;
        if (!with.takes_monitor && with.missing.empty())
            with.missing = "the monitor is not built: it needs the backend asio (Boost 1.78 or newer, and liburing)";
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
