#pragma once

#include <cstdint>
#include <mutex>
#include <ostream>
#include <string>

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

/// A number with `digits` significant digits, without an exponent.
std::string short_number(double value, int digits = 3);

}  // namespace varve::tool
