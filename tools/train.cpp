#include "commands.hpp"

#include <optional>
#include <ostream>

#include "varve/detail/text.hpp"

#include "bench_plan.hpp"
#include "bench_store.hpp"
#include "checkpoint_file.hpp"
#include "errors.hpp"
#include "events_file.hpp"
#include "measure.hpp"
#include "methods.hpp"
#include "monitor_process.hpp"
#include "phase.hpp"
#include "progress.hpp"
#include "settings.hpp"
#include "signals.hpp"
#include "step_loop.hpp"
#include "trainer.hpp"
#if VARVE_TOOL_WITH_CUDA_RUNTIME
#include "varve/cuda/nvtx_observer.hpp"
#endif

namespace varve::tool {

namespace {

method_entry const& training_method(std::string const& name) {
    auto refuse = [&] { return usage_error("--method " + name + " writes no files, so there is nothing to go on from; take one with a file sink"); };
    if (name == "none") throw refuse();
    // A run that is to survive a power cut needs the durable form of torch.save.
    auto const& entry = runnable_method(name == "traditional" ? "traditional-durable" : name);
    if (!entry.writes_files) throw refuse();
    return entry;
}

/// A training run in its store, from wherever it stands to its last step.
class training_run {
public:
    training_run(settings const& s, std::ostream& out, std::ostream& err)
        : settings_(s), entry_(training_method(s.command.method)), out_(out), progress_(err, stderr_is_terminal(), s.command.method) {
        if (!s.run.events.empty()) events_.emplace(s.run.events, s.command.method);
        observers_.add(recorder_);
        if (events_) observers_.add(*events_);
#if VARVE_TOOL_WITH_CUDA_RUNTIME
        if (profile_.attached()) observers_.add(profile_);
#endif
    }

    int run() {
        auto trainer = make_trainer(settings_);
        if (entry_.has_monitor(settings_.wants_monitor()))
            monitor_.emplace(settings_, settings_.command.dir, settings_.run.linger, [this](std::string const& line) { progress_.line(line); });
        auto method = start(*trainer);
        take_over_bench_store(settings_.command.dir);
        auto const first = restore(*trainer, *method) + 1;
        auto const last = settings_.training.num_steps;
        if (first > last) {
            out_ << "nothing left to do: " << settings_.command.dir << " stands at step " << first - 1 << " of " << last << std::endl;
            return 0;
        }
        auto const stopped_at = train(*trainer, *method, first, last);
        method->drain();
        report_failures();
        if (events_ && events_->failure()) progress_.line("events were lost: " + events_->failure().message());
        auto const outcome = last_save_->durable().wait();
        if (outcome)
            throw error(outcome, "the last save, of step " + std::to_string(last_save_->step()) + ", failed: " + outcome.message() +
                                     "; what was saved before it in " + detail::printable(settings_.command.dir) + " is as it was");
        auto path = method->newest_path().string();
        if (path.empty()) path = "the monitor's store at " + settings_.run.monitor;
        if (stopped_at)
            throw interrupted("stopped after step " + std::to_string(*stopped_at) + " of " + std::to_string(last) + ", saved in " + path +
                              (settings_.command.fresh || settings_.command.from_step
                                   ? "; the same command without --fresh, --overwrite and --from-step goes on from there"
                                   : "; the same command goes on from there"));
        out_ << "trained to step " << last << ", saved in " << path << std::endl;
        return 0;
    }

private:
    std::unique_ptr<running_method> start(trainer& t) {
        auto m = method_settings_of(settings_, observers_);
        m.dir = settings_.command.dir;
        m.made_by = "varve train";
        m.fresh = settings_.command.fresh;
        m.overwrite = settings_.command.overwrite;
        return monitor_ ? monitor_->start(entry_, t.training(), m) : entry_.start(t.training(), m);
    }

    /// Returns the step that the state stands for now, 0 for a run that begins.
    std::uint64_t restore(trainer& t, running_method& method) {
        if (settings_.command.fresh) return 0;
        restore_options options;
        options.workers = reading_workers();
        auto const since = clock::now();
        auto const restored = method.restore(settings_.command.from_step, options);
        auto const took_sec = seconds(clock::now() - since);
        if (!restored) {
            if (settings_.command.from_step)
                throw error(errc::no_checkpoint, settings_.command.dir + " has no checkpoint to go on from; leave --from-step out");
            return 0;
        }
        t.expect_same_run(restored->step);
        auto const update = t.update_kernels();
        if (auto const before = restored->metadata.find("update"); before != restored->metadata.end() && before->second != update)
            progress_.line("the update is " + update + " now and was " + detail::printable(before->second) +
                           ": the bits will not be those of a run without a stop; --update " + detail::printable(before->second) + " keeps them");
        progress_.line("goes on from " + restored->path.string() + ", restored in " + short_number(took_sec * 1e3) + " ms (" +
                       short_number(static_cast<double>(method.facts().image_bytes) / 1e9 / took_sec) + " GB/s)");
        return restored->step;
    }

    /// Returns the step after which a signal stopped it, if one did.
    std::optional<std::uint64_t> train(trainer& t, running_method& method, std::uint64_t first, std::uint64_t last) {
        for (auto step = first; step <= last; ++step) {
            auto const step_start = clock::now();
            auto const loss = [&] {
                phase in_passes("forward and backward");
                return t.forward_backward(step);
            }();
            // Before the save: a step that a restart goes on from has its loss in the file, whenever this process is killed.
            if (events_) events_->step(step, loss);
            bool const stop = stop_signals::requested(), final = stop || step == last;
            // The save that ends the run may be neither skipped nor replaced.
            if (final && busy_mode(settings_) != when_busy::block) method.drain();
            auto const before = method.stalls().total_ns;
            auto const saved = update_and_save(t, &method, step, final || step % settings_.training.checkpoint_freq == 0, loss);
            if (saved) {
                last_save_ = saved;
                auto const save_ms = static_cast<double>(method.stalls().total_ns - before) / 1e6;
                progress_.line("step " + std::to_string(step) + ": loss " + short_number(static_cast<double>(loss), 6) + ", save " +
                               (saved->taken() ? short_number(save_ms) + " ms" : "skipped") + ", step " +
                               short_number(seconds(clock::now() - step_start) * 1e3) + " ms");
            }
            report_failures();
            progress_.step(step, last, loss);
            if (stop && step < last) return step;
        }
        return std::nullopt;
    }

    /// A save that fails, because the disk is full say, is no reason to stop training: the last good checkpoint still stands.
    void report_failures() {
        for (auto const& why : recorder_.take_failures()) progress_.line(why);
    }

    settings settings_;
    method_entry const& entry_;
    std::optional<monitor_of_run> monitor_;
    std::ostream& out_;
    progress progress_;
    save_recorder recorder_;
    std::optional<events_file> events_;
#if VARVE_TOOL_WITH_CUDA_RUNTIME
    cuda::nvtx_observer profile_;
#endif
    observer_list observers_;
    std::optional<ticket> last_save_;
};

}  // namespace

int train(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    auto const s = resolve(read_settings(settings_command::train, args), {});
    if (s.command.help) {
        out << "Usage: varve train --method M --dir D [options]\n"
               "Trains the guide's transformer and saves it in the store D; killed at any moment and started again, it goes on\n"
               "from the newest whole checkpoint. Settings: default < file < flag.\n"
            << settings_help(settings_command::train);
        return 0;
    }
    require_trainer();
    check_settings(s, settings_command::train);
    if (chosen_device(s) == "cpu") check_memory(s);
    stop_signals signals(true);
    return training_run(s, out, err).run();
}

}  // namespace varve::tool
