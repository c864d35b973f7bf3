// What checkpoints cost the training loop, where the machine's speed wanders from one second to the next: stretches of steps with
// and without saves take turns in one process, and each is compared with its neighbour.
//
//   bench_loop_pairs --repeat 40 --num-steps 20 --methods layerwise --checkpoint-freq 1 --when-busy replace [options of varve bench]
//
// --repeat is the number of pairs, --num-steps the steps of each half, --warmup the steps before them. A pair begins with nothing in
// flight but, with a save in every step, one; what is in flight when a half ends, copies in the GPU's queues too, is waited for outside of the clock.
// One line of JSON for each method: the loop's ratio (median, and the interval that holds the true one with a probability of 95%), and what the
// processor did meanwhile, in milliseconds a step, with and without saves: how long the training's threads ran, and how long they
// stood ready while others ran; and with saves each thread by its name, as the kernel has it.
//
// --methods disk: nothing is saved; in place of the saves a thread overwrites a file, 8 MiB after 8 MiB, past the page cache: what the disk
// costs the loop, whoever fills it.

#include <fcntl.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "errors.hpp"
#include "measure.hpp"
#include "methods.hpp"
#include "monitor_process.hpp"
#include "report_data.hpp"
#include "settings.hpp"
#include "step_loop.hpp"
#include "trainer.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"

namespace {

using namespace varve::tool;
using nlohmann::json;

std::vector<int> threads_of_this_process() {
    std::vector<int> out;
    for (auto const& task : std::filesystem::directory_iterator("/proc/self/task")) out.push_back(std::stoi(task.path().filename()));
    return out;
}

/// What the kernel counted of some threads, in ms.
struct processor_time {
    double ran = 0, ready = 0;

    explicit processor_time(std::vector<int> const& threads) {
        for (auto id : threads) {
            std::ifstream in("/proc/self/task/" + std::to_string(id) + "/schedstat");
            if (double ran_ns = 0, ready_ns = 0; in >> ran_ns >> ready_ns) ran += ran_ns / 1e6, ready += ready_ns / 1e6;
        }
    }
};

/// What each of this process's threads has run, in ms; those of one name together.
std::map<std::string, double> ran_by_name() {
    std::map<std::string, double> out;
    for (auto id : threads_of_this_process()) {
        auto const task = "/proc/self/task/" + std::to_string(id);
        std::ifstream comm(task + "/comm");
        if (std::string name; std::getline(comm, name)) out[name] += processor_time({id}).ran;
    }
    return out;
}

/// A thread that overwrites a file for as long as it is told to.
class disk_writer {
public:
    explicit disk_writer(std::filesystem::path file) : file_(std::move(file)) {
        std::filesystem::create_directories(file_.parent_path());
        std::ranges::fill(content_.bytes(), std::byte{7});
        fd_ = {::open(file_.c_str(), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600), varve::system_calls::kernel()};
        bool whole = static_cast<bool>(fd_);
        for (std::size_t i = 0; i < pieces && whole; ++i) whole = write(i);
        if (!whole || ::fsync(fd_.get()) != 0) {
            auto const why = varve::last_system_error(errno);
            remove();
            varve::throw_if(why, file_.string());
        }
        thread_ = std::jthread([this](std::stop_token stop) {
            for (std::size_t i = 0; !stop.stop_requested(); ++i) {
                writes_.wait(false);
                if (!write(i % pieces)) failed_ = true;
            }
        });
    }
    ~disk_writer() {
        thread_.request_stop();
        set(true);
        thread_.join();
        remove();
    }
    void set(bool writes) {
        writes_ = writes;
        writes_.notify_one();
    }
    std::uint64_t written_bytes() const {
        if (failed_) throw varve::error(std::make_error_code(std::errc::io_error), file_.string() + ": a write has failed");
        return written_bytes_;
    }

private:
    static constexpr std::size_t piece_bytes = 8u << 20, pieces = 128;

    bool write(std::size_t i) {
        auto const n = ::pwrite(fd_.get(), content_.data(), piece_bytes, static_cast<off_t>(i * piece_bytes));
        if (n > 0) written_bytes_ += static_cast<std::uint64_t>(n);
        if (n >= 0) errno = EIO;  // of a short one
        return n == static_cast<ssize_t>(piece_bytes);
    }
    void remove() noexcept {
        std::error_code gone_already;
        std::filesystem::remove(file_, gone_already);
    }

    std::filesystem::path const file_;
    varve::detail::aligned_bytes content_{piece_bytes};
    varve::file_descriptor fd_;
    std::atomic<bool> writes_ = false, failed_ = false;
    std::atomic<std::uint64_t> written_bytes_ = 0;
    std::jthread thread_;
};

/// Of one half, in ms a step.
struct half {
    double loop_ms = 0, in_calls_ms = 0, training_ran_ms = 0, training_ready_ms = 0, others_ran_ms = 0;
};

class loop_pairs {
public:
    explicit loop_pairs(settings const& s) : settings_(s), trainer_(make_trainer(s)) {
        for (std::uint64_t i = 0; i < s.run.warmup; ++i) {
            trainer_->forward_backward(++step_);
            trainer_->update();
        }
        trainer_->synchronize();
        training_ = threads_of_this_process();
    }

    json run_with_disk() {
        disk_writer disk(settings_.checkpoint_dir() / "loop_pairs.disk");
        note_other_threads();
        auto const before = disk.written_bytes();
        double busy_ms = 0;
        auto out = alternate("disk", [&](bool writes) {
            auto const start = clock::now();
            disk.set(writes);
            auto const h = stretch(nullptr, false);
            disk.set(false);
            if (writes) busy_ms += seconds(clock::now() - start) * 1e3;
            return h;
        });
        out.update({{"write_gb_per_s", static_cast<double>(disk.written_bytes() - before) / busy_ms / 1e6},
                    {"saves", 0},
                    {"crash_safe", 0},
                    {"durable", 0}});
        return out;
    }

    json run(std::string const& name) {
        if (name == "disk") return run_with_disk();
        auto m = method_settings_of(settings_, observers_);
        m.dir = settings_.checkpoint_dir() / "loop_pairs";
        m.fresh = m.overwrite = m.wait_for_preparation = true;
        auto const& entry = runnable_method(name);
        std::optional<monitor_of_run> monitor;
        if (entry.has_monitor(settings_.wants_monitor()))
            monitor.emplace(settings_, m.dir, 0, [](std::string const& line) { std::cerr << line << '\n'; }, monitor_of_run::name_of_its_own(m.dir));
        auto method = monitor ? monitor->start(entry, trainer_->training(), m) : entry.start(trainer_->training(), m);
        note_other_threads();
        tickets_.clear();
        ran_.clear();
        auto out = alternate(name, [&](bool saves) { return stretch(method.get(), saves); });
        auto const durable = std::ranges::count_if(tickets_, [](auto const& t) { return !t.durable().wait(); });
        auto const crash_safe = std::ranges::count_if(tickets_, [](auto const& t) { return !t.crash_safe().wait(); });
        method.reset();
        if (monitor) monitor->end();
        std::filesystem::remove_all(m.dir);
        for (auto& [thread, ms] : ran_) ms /= static_cast<double>(settings_.run.repeat * settings_.training.num_steps);
        out.update({{"ran_ms", ran_}, {"saves", tickets_.size()}, {"crash_safe", crash_safe}, {"durable", durable}});
        return out;
    }

private:
    void note_other_threads() {
        others_ = threads_of_this_process();
        std::erase_if(others_, [&](int id) { return std::count(training_.begin(), training_.end(), id) > 0; });
    }

    /// Pairs of halves, the one and the other first in turn.
    template <class Half>
    json alternate(std::string const& name, Half half_of) {
        std::vector<half> with, without;
        std::vector<double> ratios;
        for (std::uint64_t pair = 0; pair < settings_.run.repeat; ++pair) {
            for (bool const saves : {pair % 2 == 0, pair % 2 != 0}) (saves ? with : without).push_back(half_of(saves));
            ratios.push_back(with.back().loop_ms / without.back().loop_ms);
        }
        auto const verdict = reporting::judge(std::move(ratios));
        auto each = [&](double half::* value) {
            auto of = [&](std::vector<half> const& halves) {
                std::vector<double> v;
                for (auto const& h : halves) v.push_back(h.*value);
                return median(v);
            };
            return json{{"with", of(with)}, {"without", of(without)}};
        };
        return {{"method", name},
                {"pairs", verdict.repeats},
                {"steps", settings_.training.num_steps},
                {"checkpoint_freq", settings_.training.checkpoint_freq},
                {"loop_over_none", verdict.ratio},
                {"interval_95", {verdict.low, verdict.high}},
                {"step_ms", each(&half::loop_ms)},
                {"in_calls_ms", each(&half::in_calls_ms)},
                {"training_threads_ran_ms", each(&half::training_ran_ms)},
                {"training_threads_ready_ms", each(&half::training_ready_ms)},
                {"other_threads_ran_ms", each(&half::others_ran_ms)}};
    }

    /// `method` may be null where nothing is saved.
    half stretch(running_method* method, bool saves) {
        auto const steps = settings_.training.num_steps, freq = settings_.training.checkpoint_freq;
        auto step = [&](std::uint64_t i) {
            auto const loss = trainer_->forward_backward(++step_);
            // In the middle of what would be between two of them, so that a half has all of a save's work.
            if (auto t = update_and_save(*trainer_, method, step_, saves && i % freq == freq / 2, loss)) tickets_.push_back(*t);
        };
        // With a save in every step the last one's work comes behind the half, and that of the save before it stands for it.
        if (freq == 1) step(0);
        trainer_->wait_for_steps();
        auto const names_before = ran_by_name();
        processor_time const training_before(training_), others_before(others_);
        auto const calls_ns = [&] { return method ? method->stalls().total_ns : 0; };
        auto const calls_before_ns = calls_ns();
        auto const start = clock::now();
        for (std::uint64_t i = 1; i <= steps; ++i) step(i);
        // Not for the device: the copies of a save that is on its way are no part of the loop.
        trainer_->wait_for_steps();
        auto const per_step = [&](double ms) { return ms / static_cast<double>(steps); };
        half h{.loop_ms = per_step(seconds(clock::now() - start) * 1e3),
               .in_calls_ms = per_step(static_cast<double>(calls_ns() - calls_before_ns) / 1e6)};
        processor_time const training_after(training_), others_after(others_);
        h.training_ran_ms = per_step(training_after.ran - training_before.ran);
        h.training_ready_ms = per_step(training_after.ready - training_before.ready);
        h.others_ran_ms = per_step(others_after.ran - others_before.ran);
        if (saves)
            for (auto const& [thread, ms] : ran_by_name()) {
                auto const before = names_before.find(thread);
                ran_[thread] += ms - (before == names_before.end() ? 0 : before->second);
            }
        if (method) method->drain();
        return h;
    }

    settings const settings_;
    varve::observer_list observers_;
    std::unique_ptr<trainer> trainer_;
    std::uint64_t step_ = 0;
    std::vector<int> training_, others_;
    std::map<std::string, double> ran_;  ///< in halves with saves
    std::vector<varve::ticket> tickets_;
};

}  // namespace

int main(int argc, char** argv) {
    try {
        std::vector<std::string> const args(argv + 1, argv + argc);
        // A method with a monitor starts this program again as the monitor.
        if (!args.empty() && args.front() == "monitor") return monitor({args.begin() + 1, args.end()}, std::cout, std::cerr);
        auto const s = resolve(read_settings(settings_command::bench, args), "");
        check_settings(s, settings_command::bench);
        if (s.run.repeat < 2) throw usage_error("--repeat " + std::to_string(s.run.repeat) + ": an interval takes at least 2 pairs");
        loop_pairs pairs(s);
        for (auto const& name : s.run.methods) std::cout << pairs.run(name) << std::endl;
        return 0;
    } catch (usage_error const& e) {
        std::cerr << e.what() << '\n';
        return 2;
    } catch (std::exception const& e) {
        std::cerr << e.what() << '\n';
        return 1;
    }
}
