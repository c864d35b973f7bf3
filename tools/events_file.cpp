#include "events_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#include <cinttypes>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "varve/error.hpp"

namespace varve::tool {

namespace {

std::string json_text(std::string_view text) { return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace); }

bool ends_within_a_line(std::filesystem::path const& path) {
    file_descriptor file(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    struct stat about{};
    char last = '\n';
    return file && ::fstat(file.get(), &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0 &&
           ::pread(file.get(), &last, 1, about.st_size - 1) == 1 && last != '\n';
}

}  // namespace

events_file::events_file(std::filesystem::path const& path, std::string method)
    : file_(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666), system_calls::kernel()), method_(json_text(method)) {
    if (!file_) throw_if(last_system_error(errno), "cannot write events to '" + path.string() + "'");
    if (ends_within_a_line(path)) append("\n");
}

void events_file::append(std::string_view line) noexcept {
    if (::write(file_.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size()))
        failed_.store(errno ? errno : EIO, std::memory_order_relaxed);
}

void events_file::on(event const& e) noexcept {
    try {
        std::string line = "{\"event\": \"";
        line.append(name(e.what)).append("\", \"method\": ").append(method_).append(", \"step\": ").append(std::to_string(e.step));
        line.append(", \"time_ns\": ").append(std::to_string(e.time_ns));
        if (e.bytes != 0) line.append(", \"bytes\": ").append(std::to_string(e.bytes));
        if (!e.layer.empty()) line.append(", \"layer\": ").append(json_text(e.layer));
        if (e.error) line.append(", \"error\": ").append(json_text(e.error.message()));
        append(line.append("}\n"));
    } catch (...) {
        failed_.store(ENOMEM, std::memory_order_relaxed);
    }
}

void events_file::step(std::uint64_t step, float loss) noexcept {
    auto const now = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    char line[512];
    // Nine digits give a float back to the bit; a loss that is no number has no JSON form and stays out.
    auto used = std::snprintf(line, sizeof line, "{\"event\": \"step\", \"method\": %.200s, \"step\": %" PRIu64 ", \"time_ns\": %" PRId64,
                              method_.c_str(), step, static_cast<std::int64_t>(now));
    if (loss - loss == 0) used += std::snprintf(line + used, sizeof line - used, ", \"loss\": %.9g", static_cast<double>(loss));
    used += std::snprintf(line + used, sizeof line - used, "}\n");
    append({line, static_cast<std::size_t>(used)});
}

}  // namespace varve::tool
