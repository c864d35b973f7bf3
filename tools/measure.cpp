#include "measure.hpp"

#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "machine.hpp"

namespace varve::tool {

double mean(std::vector<double> const& values) {
    return values.empty() ? 0 : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double sample_std(std::vector<double> const& values) {
    if (values.size() < 2) return 0;
    auto const m = mean(values);
    double sum = 0;
    for (auto v : values) sum += (v - m) * (v - m);
    return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

double percentile(std::vector<double> values, double q) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    auto rank = static_cast<std::size_t>(std::ceil(q * static_cast<double>(values.size())));
    return values[std::clamp<std::size_t>(rank, 1, values.size()) - 1];
}

double median(std::vector<double> values) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    auto const middle = values.size() / 2;
    return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void save_recorder::on(event const& e) noexcept {
    counters_.on(e);
    // A save has hundreds of others, one a layer and block, some of them on the training thread.
    if (e.what != milestone::begin && e.what != milestone::written && e.what != milestone::durable && e.what != milestone::failed) return;
    auto const now = clock::now();
    try {
        std::lock_guard lock(mutex_);
        if (e.what == milestone::failed) {
            failures_.push_back("the save of step " + std::to_string(e.step) + " failed: " + e.error.message());
            return;
        }
        auto& save = saves_[e.step];
        (e.what == milestone::begin ? save.begin : e.what == milestone::written ? save.written : save.durable) = now;
    } catch (...) {
        // Out of memory: the counters have it, the time is lost.
    }
}

std::map<std::uint64_t, save_recorder::save> save_recorder::saves() const {
    std::lock_guard lock(mutex_);
    return saves_;
}

std::vector<std::string> save_recorder::take_failures() {
    std::lock_guard lock(mutex_);
    return std::exchange(failures_, {});
}

namespace {

void collect_children(int pid, std::vector<int>& out) {
    std::error_code ignored;
    for (auto const& task : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/task", ignored)) {
        std::ifstream in(task.path() / "children");
        for (int child = 0; in >> child;) {
            out.push_back(child);
            collect_children(child, out);
        }
    }
}

}  // namespace

memory_sampler::memory_sampler()
    : thread_([this](std::stop_token stop) {
          std::mutex mutex;
          std::condition_variable_any wake;
          std::vector<int> children;
          auto next = clock::now();
          for (std::uint64_t i = 0; !stop.stop_requested(); ++i) {
              // Whether there are children is asked once a second: with many threads it costs more than the sample.
              if (i % 50 == 0) {
                  children.clear();
                  collect_children(::getpid(), children);
              }
              sample(children);
              next += std::chrono::milliseconds(20);
              std::unique_lock lock(mutex);
              wake.wait_until(lock, stop, next, [] { return false; });
          }
      }) {}

void memory_sampler::sample(std::vector<int> const& children) {
    double gb = resident_gb(::getpid());
    for (int child : children) gb += resident_gb(child);
    peak_ = std::max(peak_, gb);
    sum_ += gb;
    ++count_;
    now_.store(gb, std::memory_order_relaxed);
}

void memory_sampler::stop() {
    if (!thread_.joinable()) return;
    thread_.request_stop();
    thread_.join();
}

}  // namespace varve::tool
