#pragma once

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>

#include "comes_to.hpp"
#include "raw_peer.hpp"
#include "scratch_folder.hpp"
#include "varve/detail/store_folder.hpp"

namespace varve_test {

namespace va = varve::asio;

/// A monitor in a folder of its own; trainers reach it through a Unix socket or a loopback address.
struct workplace {
    explicit workplace(bool unix_socket = true, std::function<void(va::monitor_options&)> change = [](auto&) {}) {
        va::monitor_options o;
        o.dir = folder.path() / "stores";
        o.listen = {unix_socket ? va::parse_address("unix:" + (folder.path().filename() / "s").string()) : va::parse_address("tcp:127.0.0.1:0")};
        o.memory_limit_bytes = 512u << 20;
        o.linger = 300ms;
        // No PING comes between what a test counts.
        o.ping_every = o.silence_limit = 10min;
        change(o);
        monitor.emplace(o);
    }
    raw_trainer trainer(std::size_t images, std::string const& store = "run", std::shared_ptr<va::tls_context const> tls = nullptr) {
        return {monitor->where(), store, images, std::move(tls)};
    }
    std::filesystem::path file(std::uint64_t step, std::string const& store = "run") const {
        return folder.path() / "stores" / store / varve::detail::checkpoint_name(step, ".safetensors");
    }
    nlohmann::json status() { return nlohmann::json::parse(monitor->get().status()); }
    /// Waits until the status says so.
    template <class Says>
    bool becomes(Says says, std::chrono::milliseconds limit = 60s) {
        return comes_to([&] { return says(status()); }, limit);
    }
    /// The store is nobody's, and has no files but whole checkpoints and free slots.
    bool store_is_free(std::string const& store = "run") {
        return becomes([&](auto const& st) {
            for (auto const& s : st["stores"])
                if (s["path"] == (folder.path() / "stores" / store).string()) return false;
            return true;
        });
    }

    scratch_folder folder;
    std::optional<running_monitor> monitor;
};

/// A monitor, and a trainer of its store "run" that was welcomed; its pool holds so many images.
template <std::size_t Images>
struct welcomed_trainer : workplace {
    raw_trainer t{monitor->where(), "run", Images};
    wire::welcome const welcome = t.greet();
};

inline bool has(std::string const& text, std::string const& words) { return text.find(words) != std::string::npos; }

/// Descriptors and mappings of shared memory that this process has.
inline std::size_t shared_memories() {
    std::size_t count = 0;
    std::error_code gone;
    for (auto const& entry : std::filesystem::directory_iterator("/proc/self/fd"))
        count += std::filesystem::read_symlink(entry.path(), gone).string().starts_with("/memfd:");
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) count += has(line, "/memfd:");
    return count;
}

}  // namespace varve_test
