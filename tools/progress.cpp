#include "progress.hpp"

#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstdio>

namespace varve::tool {

void progress::step(std::uint64_t step, std::uint64_t steps, float loss) {
    if (!terminal_) return;
    std::lock_guard lock(mutex_);
    err_ << "\r\033[K" << label_ << "  step " << step << " of " << steps << ", loss " << short_number(static_cast<double>(loss), 4) << std::flush;
    drawn_ = true;
}

void progress::line(std::string const& text) {
    std::lock_guard lock(mutex_);
    clear();
    err_ << label_ << "  " << text << '\n' << std::flush;
}

void progress::clear() {
    if (drawn_) err_ << "\r\033[K" << std::flush;
    drawn_ = false;
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
