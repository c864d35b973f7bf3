#include "progress.hpp"

#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <stop_token>
#include <system_error>
#include <utility>

#include "table.hpp"

namespace varve::tool {

namespace {

constexpr char const* clear_line = "\r\033[K";

/// By all of the process's reads, of whatever; 0 where the kernel does not say.
std::uint64_t bytes_read() {
    std::ifstream in("/proc/self/io");
    std::string key;
    for (std::uint64_t value = 0; in >> key >> value;)
        if (key == "rchar:") return value;
    return 0;
}

}  // namespace

void progress::step(std::uint64_t step, std::uint64_t steps, float loss) {
    if (!terminal_) return;
    std::lock_guard lock(mutex_);
    err_ << clear_line << label_ << "  step " << step << " of " << steps << ", loss " << short_number(static_cast<double>(loss), 4) << std::flush;
    drawn_ = true;
}

void progress::line(std::string const& text) {
    std::lock_guard lock(mutex_);
    clear();
    err_ << label_ << "  " << text << '\n' << std::flush;
}

void progress::clear() {
    if (drawn_) err_ << clear_line << std::flush;
    drawn_ = false;
}

reading_progress::reading_progress(std::ostream& err, std::string what, std::uint64_t total_bytes, bool terminal, std::chrono::milliseconds quiet) {
    auto const before = bytes_read();
    if (before == 0) return;
    auto draw = [&err, what = std::move(what), total_bytes, terminal, quiet, before](std::stop_token stop) {
        std::mutex mutex;
        std::condition_variable_any stopped;
        std::unique_lock lock(mutex);
        auto sleeps = [&](std::chrono::milliseconds time) { return !stopped.wait_for(lock, stop, time, [&] { return stop.stop_requested(); }); };
        if (!sleeps(quiet)) return;
        do {
            auto const read = bytes_read() - before;
            err << (terminal ? clear_line : "") << what << "  "
                << (total_bytes > 0 ? size_text(std::min(read, total_bytes)) + " of " + size_text(total_bytes) : size_text(read))
                << (terminal ? "" : "\n") << std::flush;
        } while (sleeps(terminal ? std::chrono::milliseconds(200) : std::chrono::seconds(10)));
        if (terminal) err << clear_line << std::flush;
    };
    try {
        thread_ = std::jthread(std::move(draw));
    } catch (std::system_error const&) {
        // The command does without.
    }
}

bool stderr_is_terminal() { return ::isatty(STDERR_FILENO) == 1; }

std::string short_number(double value, int digits) {
    if (value == 0 || !std::isfinite(value)) return value == 0 ? "0" : "-";
    auto const before_point = static_cast<int>(std::floor(std::log10(std::fabs(value)))) + 1;
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", std::clamp(digits - before_point, 0, 9), value);
    return text;
}

}  // namespace varve::tool
