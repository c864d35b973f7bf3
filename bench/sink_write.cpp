// How fast each file sink overwrites a file that was written before: `sink_write [FILE] [key=value ...]`.
// Prints one line a run: the sink's name, GB/s, and how it wrote. bench/sink_vs_fio compares it with fio.
//   mb=256 block_mb=8 depth=8 repeat=3 sink=posix|uring|asio|all threads=N stripe_kb=N piece_kb=N registered=1 keep=0

#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <semaphore>
#include <string>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/error.hpp"
#include "varve/system.hpp"
#if __has_include("varve/posix/sink.hpp")
#include "varve/posix/sink.hpp"
#endif
#if __has_include("varve/uring/sink.hpp")
#include "varve/uring/sink.hpp"
#endif
#if __has_include("varve/asio/sink.hpp")
#include "varve/asio/sink.hpp"
#endif

namespace {

using clock_type = std::chrono::steady_clock;

struct plan {
    std::string file = "sink_write.data";
    std::map<std::string, std::string> values{{"sink", "all"}};

    std::uint64_t number(std::string const& key, std::uint64_t otherwise) const {
        auto it = values.find(key);
        return it == values.end() ? otherwise : std::strtoull(it->second.c_str(), nullptr, 10);
    }
};

/// As many buffers as may be in flight; one write is submitted for each that comes back.
template <varve::file_sink Sink>
double gigabytes_per_second(Sink& sink, plan const& p, varve::detail::aligned_bytes const& pool, int slot) {
    auto size = p.number("mb", 256) << 20;
    auto block = p.number("block_mb", 8) << 20;
    auto depth = p.number("depth", 8);
    std::counting_semaphore<> free(static_cast<std::ptrdiff_t>(depth));
    std::error_code failed;
    struct context {
        std::counting_semaphore<>* free;
        std::error_code* failed;
    } c{&free, &failed};
    auto target = sink.open({AT_FDCWD, p.file, size});
    auto begin = clock_type::now();
    for (std::uint64_t at = 0, i = 0; at < size; at += block, ++i) {
        free.acquire();
        target.write(at, {pool.data() + (i % depth) * block, std::min(block, size - at), varve::memory_kind::host, slot},
                     {[](void* to, std::error_code error) noexcept {
                          auto& x = *static_cast<context*>(to);
                          if (error) *x.failed = error;
                          x.free->release();
                      },
                      &c});
    }
    for (std::uint64_t i = 0; i < depth; ++i) free.acquire();
    std::chrono::duration<double> took = clock_type::now() - begin;
    varve::throw_if(failed, "cannot write " + p.file);
    return static_cast<double>(size) / took.count() / 1e9;
}

template <varve::file_sink Sink>
void run(char const* name, Sink sink, plan const& p) {
    varve::detail::aligned_bytes pool(p.number("depth", 8) * (p.number("block_mb", 8) << 20));
    std::memset(pool.data(), 0x5a, pool.size());
    int slot = varve::unregistered;
    if constexpr (varve::registering_sink<Sink>)
        if (p.number("registered", 1) != 0) slot = sink.register_memory(pool.bytes());
    for (std::uint64_t i = 0; i < p.number("repeat", 3); ++i) {
        double speed = gigabytes_per_second(sink, p, pool, slot);
        std::printf("%s %.3f GB/s (%s)\n", name, speed, sink.describe().c_str());
        std::fflush(stdout);
    }
}

/// Fills the file, so that every run overwrites.
void prepare(plan const& p) {
    auto size = p.number("mb", 256) << 20;
    struct stat status{};
    if (::stat(p.file.c_str(), &status) == 0 && static_cast<std::uint64_t>(status.st_size) == size) return;
    auto& calls = varve::system_calls::kernel();
    varve::file_descriptor fd(calls.openat(AT_FDCWD, p.file.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0644), calls);
    varve::detail::aligned_bytes bytes(1u << 20);
    std::memset(bytes.data(), 1, bytes.size());
    for (std::uint64_t at = 0; at < size; at += bytes.size())
        if (calls.pwrite(fd.get(), bytes.data(), bytes.size(), static_cast<off_t>(at)) < 0) varve::throw_if(varve::last_system_error(errno), p.file);
    if (calls.fsync(fd.get()) != 0) varve::throw_if(varve::last_system_error(errno), p.file);
}

}  // namespace

int main(int argc, char** argv) try {
    plan p;
    for (int i = 1; i < argc; ++i) {
        std::string arg = argv[i];
        if (auto eq = arg.find('='); eq != std::string::npos)
            p.values[arg.substr(0, eq)] = arg.substr(eq + 1);
        else
            p.file = arg;
    }
    prepare(p);
    auto wanted = [&](char const* name) { return p.values["sink"] == "all" || p.values["sink"] == name; };
#if __has_include("varve/posix/sink.hpp")
    if (wanted("posix")) {
        varve::posix::sink_options o;
        o.writer_threads = static_cast<unsigned>(p.number("threads", o.writer_threads));
        o.stripe_bytes = p.number("stripe_kb", o.stripe_bytes >> 10) << 10;
        run("posix", varve::posix::sink(o), p);
    }
#endif
#if __has_include("varve/uring/sink.hpp")
    if (wanted("uring")) {
        if (auto refused = varve::uring::sink::available()) {
            std::printf("uring skipped: %s\n", refused.message().c_str());
        } else {
            varve::uring::sink_options o;
            o.queue_depth = static_cast<unsigned>(p.number("queue", o.queue_depth));
            o.piece_bytes = p.number("piece_kb", o.piece_bytes >> 10) << 10;
            run("uring", varve::uring::sink(o), p);
        }
    }
#endif
#if __has_include("varve/asio/sink.hpp")
    if (wanted("asio")) {
        if (auto refused = varve::asio::sink::available()) {
            std::printf("asio skipped: %s\n", refused.message().c_str());
        } else {
            varve::asio::sink_options o;
            o.queue_depth = static_cast<unsigned>(p.number("queue", o.queue_depth));
            o.piece_bytes = p.number("piece_kb", o.piece_bytes >> 10) << 10;
            run("asio", varve::asio::sink(o), p);
        }
    }
#endif
    if (p.number("keep", 0) == 0) ::unlink(p.file.c_str());
    return 0;
} catch (std::exception const& e) {
    std::fprintf(stderr, "sink_write: %s\n", e.what());
    return 1;
}
