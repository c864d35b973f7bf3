#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <ostream>
#include <string>
#include <thread>
#include <utility>

namespace varve::tool {

/// Progress on standard error: a line that is redrawn on a terminal, and lines that stay anywhere.
class progress {
public:
    progress(std::ostream& err, bool terminal, std::string label) : err_(err), terminal_(terminal), label_(std::move(label)) {}
    ~progress() { clear(); }

    /// Redraws `step of steps`; nothing where there is no terminal.
    void step(std::uint64_t step, std::uint64_t steps, float loss);
    /// A line that stays.
    void line(std::string const& text);

private:
    void clear();

    std::ostream& err_;
    bool terminal_;
    std::mutex mutex_;  ///< lines come from other threads too
    bool drawn_ = false;
    std::string label_;
};

/// Whether standard error is a terminal.
bool stderr_is_terminal();

/// How far a command has come that reads files: redrawn on a terminal five times a second, once it has taken a second; elsewhere a
/// line every ten seconds. Counted is what the process has read since this was made.
class reading_progress {
public:
    /// `total_bytes`: 0 where nobody knows.
    reading_progress(std::ostream& err, std::string what, std::uint64_t total_bytes = 0)
        : reading_progress(err, std::move(what), total_bytes, stderr_is_terminal()) {}
    /// `quiet`: nothing is shown before.
    reading_progress(std::ostream& err, std::string what, std::uint64_t total_bytes, bool terminal)
        : reading_progress(err, std::move(what), total_bytes, terminal, std::chrono::seconds(terminal ? 1 : 10)) {}
    reading_progress(std::ostream& err, std::string what, std::uint64_t total_bytes, bool terminal, std::chrono::milliseconds quiet);

private:
    std::jthread thread_;
};

/// A number with `digits` significant digits, without an exponent.
std::string short_number(double value, int digits = 3);

}  // namespace varve::tool
