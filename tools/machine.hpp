#pragma once

#include <cstdint>
#include <filesystem>

#include <nlohmann/json.hpp>

namespace varve::tool {

/// What a result says about where it was measured: cpu, cores, memory, kernel, os, file_system of the folder.
nlohmann::json describe_machine(std::filesystem::path const& checkpoint_dir);

/// Bytes of memory that this process may use: the machine's, or its control group's limit where that is lower.
std::uint64_t usable_memory_bytes();

/// Bytes that the file system of a folder (or of its nearest existing parent) has free for this user.
std::uint64_t free_disk_bytes(std::filesystem::path const& dir);

/// Bytes of memory, in GB (10^9), of one process; 0 if it is gone.
double resident_gb(int pid);

}  // namespace varve::tool
