#include "bench_child.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cmath>
#include <iostream>
#include <iterator>

#include <nlohmann/json.hpp>

#include "varve/detail/digest.hpp"

#include "checkpoint_file.hpp"
#include "errors.hpp"
#include "events_file.hpp"
#include "measure.hpp"
#include "methods.hpp"
#include "monitor_process.hpp"
#include "phase.hpp"
#include "process.hpp"
#include "progress.hpp"
#include "signals.hpp"
#include "step_loop.hpp"
#include "trainer.hpp"
#if VARVE_TOOL_WITH_CUDA_RUNTIME
#include <cuda_runtime_api.h>

#include "varve/cuda/error.hpp"
#include "varve/cuda/nvtx_observer.hpp"
#endif

namespace varve::tool {

namespace {

using json = nlohmann::json;

/// What the loop leaves behind.
struct loop_record {
    std::vector<double> step_ms;   ///< without the stall
    std::vector<double> stall_ms;  ///< a checkpoint each, from its begin to the next one's
    std::vector<double> wait_ms, gpu_wait_ms;
    std::optional<double> first_due_sec;  ///< when the first checkpoint could begin
    double loop_sec = 0;
    clock::time_point start, end;
    float loss = 0;
    detail::running_digest losses;
    bool stopped = false;
};

/// Processor time of this process, all threads; a monitor's is its own.
double cpu_seconds() {
    rusage used{};
    ::getrusage(RUSAGE_SELF, &used);
    auto of = [](timeval const& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6; };
    return of(used.ru_utime) + of(used.ru_stime);
}

double ms(std::int64_t ns) { return static_cast<double>(ns) / 1e6; }

class method_run {
public:
    method_run(json const& job, std::ostream& err)
        : settings_(settings_from_json(job.at("settings"))), name_(job.at("method")), store_(job.at("store").get<std::string>()),
          progress_(err, stderr_is_terminal(), job.at("label")) {
        if (!settings_.run.events.empty()) events_.emplace(settings_.run.events, name_);
        observers_.add(recorder_);
        if (events_) observers_.add(*events_);
#if VARVE_TOOL_WITH_CUDA_RUNTIME
        if (profile_.attached()) observers_.add(profile_);
#endif
        if (name_ != "none") entry_ = &runnable_method(name_);
    }

    json run() {
        auto trainer = make_trainer(settings_);
        auto const setup_start = clock::now();
        if (entry_ && entry_->has_monitor(settings_.wants_monitor()))
            monitor_.emplace(
                settings_, store_, 0, [this](std::string const& line) { progress_.line(line); }, monitor_of_run::name_of_its_own(store_));
        auto method = start_to_train(*trainer);
        double const setup_sec = seconds(clock::now() - setup_start);
        warm_up(*trainer);

        memory_sampler memory;
        auto const cpu_before = cpu_seconds();
        loop_record loop = train(*trainer, method.get(), memory);
        if (method) method->drain();
        auto const cpu_sec = cpu_seconds() - cpu_before;
        memory.stop();
        if (loop.stopped) throw interrupted("");

        json out = measured(loop, memory, trainer->peak_device_bytes() + (method ? method->facts().device_bytes : 0));
        out["setup_time_sec"] = setup_sec;
        out["cpu_time_sec"] = cpu_sec;
        auto const final_bits = fingerprint(trainer->tensors());
        auto const facts = facts_of_trainer();
        out["_torch"] = {{"torch_version", facts.torch_version}, {"torch_threads", facts.threads}};
        if (auto const gpu = name_of_gpu(); !gpu.empty()) out["_torch"]["gpu"] = gpu;
        if (method) {
            describe(*method, out);
            auto const newest = method->newest_path();
            // The first model's memory goes before the second one is built.
            method.reset();
            trainer.reset();
            // What is measured next is a file's restore, but where only the monitor has the file.
            if (monitor_ && !monitor_->is_external()) monitor_.reset();
            if (entry_->writes_files && recorder_.count(milestone::written) > 0) out["restore"] = restore(final_bits, newest);
        }
        if (events_ && events_->failure()) progress_.line("events were lost: " + events_->failure().message());
        return out;
    }

private:
    std::unique_ptr<running_method> start_to_train(trainer& t) {
        if (!entry_) return nullptr;
        auto m = settings_of_method();
        m.wait_for_preparation = m.prepare != prepare_mode::none;
        // Here the store was emptied; where it is a name at a monitor, this run's first checkpoint does it.
        m.fresh = m.overwrite = monitor_ && monitor_->is_over_tcp();
        return start(t, m);
    }
    std::unique_ptr<running_method> start_to_restore(trainer& t) {
        auto m = settings_of_method();
        m.prepare = prepare_mode::none;
        return start(t, m);
    }
    std::unique_ptr<running_method> start(trainer& t, method_settings const& m) {
        return monitor_ ? monitor_->start(*entry_, t.training(), m) : entry_->start(t.training(), m);
    }
    method_settings settings_of_method() {
        auto m = method_settings_of(settings_, observers_);
        m.dir = store_;
        m.made_by = "varve bench";
        m.measure_waits = true;
        // No more files are written ahead than checkpoints will be.
        m.keep =
            std::min(m.keep, static_cast<std::size_t>(std::max<std::uint64_t>(1, settings_.training.num_steps / settings_.training.checkpoint_freq)));
        return m;
    }

    /// Of the one that trains; empty on a CPU.
    std::string name_of_gpu() const {
#if VARVE_TOOL_WITH_CUDA_RUNTIME
        int device = 0;
        cudaDeviceProp about{};
        if (chosen_device(settings_) == "cuda" && !cuda::code_of(::cudaGetDevice(&device)) &&
            !cuda::code_of(::cudaGetDeviceProperties(&about, device)))
            return about.name;
#endif
        return {};
    }

    /// Batches of their own, from far beyond the run, so that step 1 is the first to see its data.
    void warm_up(trainer& t) {
        for (std::uint64_t i = 1; i <= settings_.run.warmup && !stop_signals::requested(); ++i) {
            t.forward_backward(settings_.training.num_steps + i);
            t.update();
        }
        t.synchronize();
    }

    loop_record train(trainer& t, running_method* method, memory_sampler& memory) {
        loop_record r;
        auto const steps = settings_.training.num_steps, freq = settings_.training.checkpoint_freq;
        stall_times at_begin, zero;
        auto stalls = [&] { return method ? method->stalls() : zero; };
        bool open = false;
        auto close_checkpoint = [&](stall_times const& now) {
            if (!std::exchange(open, false)) return;
            r.stall_ms.push_back(ms(now.total_ns - at_begin.total_ns));
            r.wait_ms.push_back(ms(now.wait_ns - at_begin.wait_ns));
            r.gpu_wait_ms.push_back(ms(now.gpu_wait_ns - at_begin.gpu_wait_ns));
        };
        r.start = clock::now();
        for (std::uint64_t step = 1; step <= steps && !r.stopped; ++step) {
            auto const before = stalls();
            auto const step_start = clock::now();
            {
                phase in_passes("forward and backward");
                r.loss = t.forward_backward(step);
            }
            if (events_) events_->step(step, r.loss);
            r.stopped = stop_signals::requested();
            bool const due = step % freq == 0 || (r.stopped && method);
            if (due && !r.first_due_sec) r.first_due_sec = seconds(clock::now() - r.start);
            // The last save must not be one that is skipped or gives way.
            if (r.stopped && method && busy_mode(settings_) != when_busy::block) method->drain();
            auto const saved = update_and_save(t, method, step, due, r.loss);
            auto const after = stalls();
            r.step_ms.push_back(seconds(clock::now() - step_start) * 1e3 - ms(after.total_ns - before.total_ns));
            r.losses.add(std::as_bytes(std::span(&r.loss, 1)));
            if (saved && saved->taken()) {
                // From the begin of one checkpoint to the next one's; what a skipped save took belongs to the one before it.
                close_checkpoint(before);
                at_begin = before;
                open = true;
                progress_.line("step " + std::to_string(step) + ": save " + short_number(ms(after.total_ns - before.total_ns)) + " ms, step " +
                               short_number(mean(r.step_ms)) + " ms, memory " + short_number(memory.now_gb()) + " GB");
            } else if (saved) {
                progress_.line("step " + std::to_string(step) + ": save skipped, as many as allowed were in flight");
            }
            for (auto const& why : recorder_.take_failures()) progress_.line(why);
            progress_.step(step, steps, r.loss);
        }
        close_checkpoint(stalls());
        t.synchronize();
        r.end = clock::now();
        r.loop_sec = seconds(r.end - r.start);
        return r;
    }

    json measured(loop_record& r, memory_sampler const& memory, std::uint64_t peak_device_bytes) {
        for (auto const& why : recorder_.take_failures()) progress_.line(why);
        auto drained = r.end;
        std::vector<double> latency_ms;
        for (auto const& [step, save] : recorder_.saves()) {
            auto const done = save.done();
            if (!done || !save.begin) continue;
            drained = std::max(drained, *done);
            latency_ms.push_back(seconds(*done - *save.begin) * 1e3);
        }
        double const drained_sec = seconds(drained - r.start);
        auto const samples = settings_.training.num_steps * settings_.training.batch_size;
        json out;
        out["training_step"] = {{"mean_ms", mean(r.step_ms)}, {"std_ms", sample_std(r.step_ms)}};
        out["memory"] = {
            {"peak_cpu_gb", memory.peak_gb()}, {"mean_cpu_gb", memory.mean_gb()}, {"peak_gpu_gb", static_cast<double>(peak_device_bytes) / 1e9}};
        out["throughput"] = {{"samples_per_sec", static_cast<double>(samples) / drained_sec}, {"total_samples", samples}};
        out["loop_time_sec"] = r.loop_sec;
        out["drained_time_sec"] = out["total_time_sec"] = drained_sec;
        if (std::isfinite(r.loss)) out["final_loss"] = static_cast<double>(r.loss);
        out["_losses"] = detail::hex(r.losses.value());
        if (r.first_due_sec) out["_first_due_sec"] = *r.first_due_sec;
        if (monitor_) out["crash_safe"] = recorder_.count(milestone::crash_safe);
        for (auto m : {milestone::durable, milestone::written, milestone::skipped, milestone::replaced, milestone::failed})
            out[std::string(name(m))] = recorder_.count(m);
        if (!r.stall_ms.empty()) {
            auto const& s = r.stall_ms;
            double total = 0;
            for (auto v : s) total += v;
            out["checkpoint"] = {{"mean_ms", mean(s)},         {"std_ms", sample_std(s)}, {"min_ms", percentile(s, 0)},
                                 {"max_ms", percentile(s, 1)}, {"total_ms", total},       {"count", s.size()}};
            out["stall"] = {{"mean_ms", mean(s)},
                            {"p50_ms", percentile(s, 0.5)},
                            {"p99_ms", percentile(s, 0.99)},
                            {"wait_ms", mean(r.wait_ms)},
                            {"gpu_wait_ms", mean(r.gpu_wait_ms)}};
            out["checkpoint_overhead_percent"] = 100 * total / 1e3 / drained_sec;
        }
        if (!latency_ms.empty())
            out["latency"] = {{"mean_ms", mean(latency_ms)}, {"p50_ms", percentile(latency_ms, 0.5)}, {"p99_ms", percentile(latency_ms, 0.99)}};
        latency_ms_ = std::move(latency_ms);
        return out;
    }

    /// What took effect, and the rates that follow from a checkpoint's size.
    void describe(running_method& method, json& out) {
        auto const f = method.facts();
        out["_facts"] = {{"combination", f.combination},         {"sink", f.sink},
                         {"image_bytes", f.image_bytes},         {"pool_bytes", f.pool_bytes},
                         {"block_bytes", f.block_bytes},         {"max_in_flight", f.max_in_flight},
                         {"writing_at_once", f.writing_at_once}, {"writer_threads", f.writer_threads},
                         {"digest_workers", f.digest_workers},   {"staging", f.staging}};
        std::error_code none;
        auto bytes = static_cast<double>(f.image_bytes);
        if (auto const path = method.newest_path(); !path.empty())
            if (auto const size = std::filesystem::file_size(path, none); !none) bytes = static_cast<double>(size);
        out["_checkpoint_bytes"] = bytes;
        if (latency_ms_.empty()) return;
        std::vector<double> rates;
        for (auto v : latency_ms_) rates.push_back(bytes / 1e6 / std::max(v, 1e-6));
        out["io_performance"] = {{"data_size_gb", bytes / 1e9},
                                 {"mean_io_throughput_gbps", mean(rates)},
                                 {"max_io_throughput_gbps", percentile(rates, 1)},
                                 {"min_io_throughput_gbps", percentile(rates, 0)}};
    }

    static void drop_pages(std::filesystem::path const& path) {
        file_descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC), system_calls::kernel());
        if (!file) return;
        ::fdatasync(file.get());  // only clean pages can be dropped
        ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
    }

    /// A restore does not: what the cache lacks it reads past it.
    static void fill_page_cache(std::filesystem::path const& path) {
        file_descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC), system_calls::kernel());
        std::vector<std::byte> piece(std::size_t{4} << 20);
        while (file && ::read(file.get(), piece.data(), piece.size()) > 0) {
        }
    }

    /// The median of three, after one that does not count: where a page is read for the second time, the kernel moves it to those in
    /// use, which takes as long as the copy. What others load is timed in the same way (bench/twin.py).
    static double warm_restore_sec(running_method& method, std::uint64_t step, restore_options const& options) {
        method.restore(step, options);
        std::vector<double> times;
        for (int i = 0; i < 3; ++i) {
            auto const start = clock::now();
            method.restore(step, options);
            times.push_back(seconds(clock::now() - start));
        }
        return median(std::move(times));
    }

    json restore(std::vector<std::pair<std::string, std::string>> const& final_bits, std::filesystem::path const& newest) {
        auto trainer = make_trainer(settings_);
        auto method = start_to_restore(*trainer);
        restore_options options;
        // Training does not run beside it: every core may read and hash.
        options.workers = reading_workers();
        drop_pages(newest);
        auto const cold_start = clock::now();
        auto const restored = method->restore(std::nullopt, options);
        auto const cold_sec = seconds(clock::now() - cold_start);
        if (!restored) throw error(errc::no_checkpoint, store_.string() + " has no whole checkpoint after the run");
        // One that came from a monitor's memory, or another host, is no file here.
        std::error_code no_file;
        auto const file_bytes = std::filesystem::file_size(restored->path, no_file);
        auto const bytes = static_cast<double>(no_file ? method->facts().image_bytes : file_bytes);
        fill_page_cache(newest);
        auto const warm_sec = warm_restore_sec(*method, restored->step, options);

        trainer->expect_same_run(restored->step);
        for (auto step = restored->step + 1; step <= settings_.training.num_steps; ++step) {
            trainer->forward_backward(step);
            trainer->update();
        }
        bool exact = true;
        auto const bits = fingerprint(trainer->tensors());
        for (std::size_t i = 0; i < std::max(bits.size(), final_bits.size()) && exact; ++i)
            if (i >= bits.size() || i >= final_bits.size() || bits[i] != final_bits[i]) {
                exact = false;
                progress_.line("restored from step " + std::to_string(restored->step) + ", the run ends with other bits in " +
                               (i < bits.size() ? bits[i].first : final_bits[i].first));
            }
        return {{"time_ms", cold_sec * 1e3}, {"gbps", bytes / 1e9 / cold_sec}, {"warm_gbps", bytes / 1e9 / warm_sec}, {"bit_exact", exact}};
    }

    settings settings_;
    std::string name_;
    std::filesystem::path store_;
    progress progress_;
    method_entry const* entry_ = nullptr;
    std::optional<monitor_of_run> monitor_;  ///< outlives the method
    save_recorder recorder_;
    std::optional<events_file> events_;
#if VARVE_TOOL_WITH_CUDA_RUNTIME
    cuda::nvtx_observer profile_;
#endif
    observer_list observers_;
    std::vector<double> latency_ms_;
};

}  // namespace

int bench_run(std::vector<std::string> const&, std::ostream&, std::ostream& err) {
    stop_signals signals(false);
    json answer;
    int code = 0;
    // What goes wrong is the parent's to say, in one line.
    try {
        auto const job = json::parse(std::string(std::istreambuf_iterator<char>(std::cin), {}));
        answer = method_run(job, err).run();
    } catch (interrupted const&) {
        return 130;
    } catch (usage_error const& e) {
        answer["_error"] = e.what();
        code = 2;
    } catch (std::bad_alloc const&) {
        answer["_error"] = "out of memory; take a smaller model or a smaller --pool-size-mb";
        code = 1;
    } catch (std::exception const& e) {
        answer["_error"] = e.what();
        code = 1;
    }
    auto const text = answer.dump(-1, ' ', false, json::error_handler_t::replace);
    for (std::size_t at = 0; at < text.size();) {
        auto const n = ::write(result_descriptor, text.data() + at, text.size() - at);
        if (n <= 0) throw_if(last_system_error(errno), "cannot hand the result on");
        at += static_cast<std::size_t>(n);
    }
    return code;
}

}  // namespace varve::tool
