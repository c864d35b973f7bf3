#include "machine.hpp"

#include <sched.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace varve::tool {

namespace {

std::string value_after(std::string const& file, std::string const& key, char separator) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
        if (line.compare(0, key.size(), key) != 0) continue;
        auto at = line.find(separator);
        if (at == std::string::npos) continue;
        auto value = line.substr(at + 1);
        value.erase(0, value.find_first_not_of(" \t\""));
        value.erase(value.find_last_not_of(" \t\"") + 1);
        return value;
    }
    return {};
}

std::filesystem::path nearest_existing(std::filesystem::path dir) {
    std::error_code ignored;
    dir = std::filesystem::absolute(dir, ignored);
    while (!dir.empty() && dir != dir.root_path() && !std::filesystem::exists(dir, ignored)) dir = dir.parent_path();
    return dir;
}

/// Type and device of the mount that holds the folder: the longest mount point that is a prefix of its path.
std::string file_system_of(std::filesystem::path const& dir) {
    std::error_code ignored;
    auto path = std::filesystem::weakly_canonical(nearest_existing(dir), ignored).string() + "/";
    std::ifstream in("/proc/self/mounts");
    std::string best, found;
    for (std::string line; std::getline(in, line);) {
        std::istringstream words(line);
        std::string device, point, type;
        words >> device >> point >> type;
        if (point.empty() || point.back() != '/') point += '/';
        if (path.compare(0, point.size(), point) == 0 && point.size() >= best.size()) {
            best = point;
            found = type;
        }
    }
    return found;
}

}  // namespace

std::uint64_t usable_memory_bytes() {
    auto bytes = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
    // Control groups, version 2 below its own path and at the root (as inside a container), then version 1.
    auto group = value_after("/proc/self/cgroup", "0:", ':');
    if (auto colon = group.find(':'); colon != std::string::npos) group.erase(0, colon + 1);
    for (auto const& file : {"/sys/fs/cgroup" + group + "/memory.max", std::string("/sys/fs/cgroup/memory.max"),
                             std::string("/sys/fs/cgroup/memory/memory.limit_in_bytes")}) {
        std::uint64_t limit = 0;
        if (std::ifstream in(file); in >> limit && limit > 0) bytes = std::min(bytes, limit);
    }
    return bytes;
}

std::uint64_t free_disk_bytes(std::filesystem::path const& dir) {
    struct statvfs info{};
    if (statvfs(nearest_existing(dir).c_str(), &info) != 0) return 0;
    return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

double resident_gb(int pid) {
    std::ifstream in("/proc/" + std::to_string(pid) + "/statm");
    std::uint64_t size = 0, resident = 0;
    in >> size >> resident;
    return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1e9;
}

nlohmann::json describe_machine(std::filesystem::path const& checkpoint_dir) {
    nlohmann::json out;
    auto add = [&](char const* key, std::string const& value) {
        if (!value.empty()) out[key] = value;
    };
    add("cpu", value_after("/proc/cpuinfo", "model name", ':'));
    cpu_set_t mask;
    out["cores"] = sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    out["memory_gb"] = static_cast<double>(usable_memory_bytes()) / 1e9;
    utsname kernel{};
    if (uname(&kernel) == 0) out["kernel"] = std::string(kernel.sysname) + " " + kernel.release + " " + kernel.machine;
    add("os", value_after("/etc/os-release", "PRETTY_NAME=", '='));
    add("file_system", file_system_of(checkpoint_dir));
    return out;
}

}  // namespace varve::tool
