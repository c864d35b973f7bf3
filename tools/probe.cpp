#include "probe.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <iomanip>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <system_error>

#include "build_config.hpp"
#include "command_line.hpp"
#include "commands.hpp"
#include "errors.hpp"
#include "gpu_copies.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/detail/aligned_bytes.hpp"
#include "varve/detail/digest.hpp"
#include "varve/image.hpp"
#include "varve/system.hpp"
#if VARVE_TOOL_WITH_POSIX
#include "varve/posix/sink.hpp"
#endif
#if VARVE_TOOL_WITH_URING
#include "varve/uring/sink.hpp"
#endif
#if VARVE_TOOL_WITH_ASIO
#include "varve/asio/sink.hpp"
#endif
#if VARVE_TOOL_WITH_GDS
#include "varve/cuda/memory.hpp"
#include "varve/gds/sink.hpp"
#endif

namespace varve::tool {
namespace {

using clock = std::chrono::steady_clock;

constexpr int rounds = 3;
constexpr std::size_t buffer_count = 8;

double seconds_since(clock::time_point start) { return std::chrono::duration<double>(clock::now() - start).count(); }

/// A file without a name where the file system gives that, so that even a killed probe leaves nothing behind.
class scratch_file {
public:
    explicit scratch_file(std::filesystem::path const& dir) : dir_(dir) {
        if (!std::filesystem::is_directory(dir))
            throw error(std::make_error_code(std::errc::not_a_directory), dir.string() + ": no such folder; name one that exists");
        fd_ = file_descriptor(::open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), system_calls::kernel());
        if (fd_) {
            reach_by_descriptor();
            return;
        }
        folder_ = file_descriptor(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel());
        if (!folder_) throw_if(last_system_error(errno), dir.string() + ": cannot open the folder");
        auto const name = ".varve-probe-" + std::to_string(::getpid());
        fd_ = file_descriptor(::openat(folder_.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600), system_calls::kernel());
        if (!fd_) throw_if(last_system_error(errno), dir.string() + ": cannot write here; check the folder's permissions");
        ::unlinkat(folder_.get(), name.c_str(), 0);
        reach_by_descriptor();
    }
    scratch_file(scratch_file const&) = delete;
    scratch_file& operator=(scratch_file const&) = delete;

    open_request request(std::uint64_t size) const { return {folder_.get(), name_, size}; }
    /// So that reads have to go to the disk.
    void drop_from_cache() const { ::posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED); }

private:
    /// The file has no name of its own, so that nothing is left behind whatever ends the process.
    void reach_by_descriptor() {
        folder_ = file_descriptor(::open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel());
        name_ = std::to_string(fd_.get());
    }

    std::filesystem::path dir_;
    file_descriptor fd_, folder_;
    std::string name_;
};

/// Random bytes in a few buffers, each in flight once at a time.
class buffers {
public:
    static constexpr auto memory = memory_kind::host;

    explicit buffers(std::size_t block_bytes) : block_bytes_(block_bytes), memory_(buffer_count * block_bytes), region_(memory_.bytes()) {
        std::mt19937_64 random(1);
        for (std::size_t at = 0; at < memory_.size(); at += 8) {
            auto word = random();
            std::memcpy(memory_.data() + at, &word, 8);
        }
        for (std::size_t i = 0; i < buffer_count; ++i) slots_.push_back({this, i});
        for (auto& s : slots_) free_.push_back(&s);
    }

    struct one {
        buffers* all;
        std::size_t index;
        std::byte* data() const { return all->region_.data() + index * all->block_bytes_; }
        completion done() {
            return {[](void* context, std::error_code ec) noexcept {
                        auto& mine = *static_cast<one*>(context);
                        std::lock_guard lock(mine.all->mutex_);
                        if (ec) mine.all->error_ = ec;
                        mine.all->free_.push_back(&mine);
                        mine.all->freed_.notify_one();
                    },
                    this};
        }
    };

    std::span<std::byte> region() { return region_; }
    one& take() {
        std::unique_lock lock(mutex_);
        freed_.wait(lock, [&] { return !free_.empty(); });
        auto* s = free_.back();
        free_.pop_back();
        return *s;
    }
    void wait_for_all() {
        std::unique_lock lock(mutex_);
        freed_.wait(lock, [&] { return free_.size() == buffer_count; });
        throw_if(error_, "the folder does not take what is measured; a smaller --size-mb, or another folder, may do");
    }

protected:
    std::size_t block_bytes_;
    detail::aligned_bytes memory_;
    std::span<std::byte> region_;  ///< where the bytes are

private:
    std::mutex mutex_;
    std::condition_variable freed_;
    std::vector<one> slots_;
    std::vector<one*> free_;
    std::error_code error_;
};

#if VARVE_TOOL_WITH_GDS
/// The same bytes in GPU memory.
class gpu_buffers : public buffers {
public:
    static constexpr auto memory = memory_kind::device;

    explicit gpu_buffers(std::size_t block_bytes) : buffers(block_bytes), on_gpu_(buffer_count * block_bytes) {
        cuda::throw_if(::cudaMemcpy(on_gpu_.data(), memory_.data(), memory_.size(), cudaMemcpyDefault), "probe: to the GPU");
        region_ = on_gpu_.bytes();
    }

private:
    cuda::device_bytes on_gpu_;
};
#endif

struct rates {
    double write = 0, read = 0;  ///< GB/s, the best round
    std::string describe;
};

/// One sink, with its memory registered, and what it reached.
template <class Sink, class Buffers = buffers>
class measured_sink {
public:
    explicit measured_sink(Sink sink) : buffers_(sink.limits().best_block_bytes), sink_(std::move(sink)) {
        if constexpr (registering_sink<Sink>) slot_ = sink_.register_memory(buffers_.region());
    }

    void round(scratch_file const& file, std::uint64_t size, bool counts) {
        auto block_bytes = sink_.limits().best_block_bytes;
        auto target = sink_.open(file.request(size));
        auto start = clock::now();
        for (std::uint64_t at = 0; at < size; at += block_bytes) {
            auto& b = buffers_.take();
            target.write(at, {b.data(), static_cast<std::size_t>(std::min<std::uint64_t>(block_bytes, size - at)), Buffers::memory, slot_}, b.done());
        }
        buffers_.wait_for_all();
        throw_if(target.sync(), "probe: sync failed");
        auto written = static_cast<double>(size) / 1e9 / seconds_since(start);
        file.drop_from_cache();
        start = clock::now();
        for (std::uint64_t at = 0; at < size; at += block_bytes) {
            auto& b = buffers_.take();
            std::span<std::byte> into(b.data(), static_cast<std::size_t>(std::min<std::uint64_t>(block_bytes, size - at)));
            if constexpr (Buffers::memory == memory_kind::device)
                target.read(at, into, Buffers::memory, slot_, b.done());
            else
                target.read(at, into, b.done());
        }
        buffers_.wait_for_all();
        auto read = static_cast<double>(size) / 1e9 / seconds_since(start);
        if (!counts) return;
        reached_.write = std::max(reached_.write, written);
        reached_.read = std::max(reached_.read, read);
        reached_.describe = sink_.describe();
    }

    rates reached() const { return reached_; }

private:
    Buffers buffers_;  ///< outlive the sink, which was told of them
    Sink sink_;
    int slot_ = unregistered;
    rates reached_;
};

/// Between GPU memory and a file, through cuFile; nothing where it does not start here.
std::optional<rates> measure_gds([[maybe_unused]] std::filesystem::path const& dir, [[maybe_unused]] std::uint64_t size_bytes) {
#if VARVE_TOOL_WITH_GDS
    if (gds::sink::available()) return std::nullopt;
    scratch_file file(dir);
    measured_sink<gds::sink, gpu_buffers> gpu{gds::sink()};
    gpu.round(file, size_bytes, false);
    for (int i = 0; i < rounds; ++i) gpu.round(file, size_bytes, true);
    return gpu.reached();
#else
    return std::nullopt;
#endif
}

double memory_copy_rate() {
    constexpr std::size_t bytes = 256u << 20;
    detail::aligned_bytes from(bytes), to(bytes);
    std::memset(from.data(), 1, bytes);
    std::memset(to.data(), 2, bytes);
    double best = 0;
    for (int i = 0; i < rounds; ++i) {
        auto start = clock::now();
        std::memcpy(to.data(), from.data(), bytes);
        best = std::max(best, bytes / 1e9 / seconds_since(start));
    }
    return best;
}

double digest_rate() {
    constexpr std::size_t bytes = 64u << 20;
    detail::aligned_bytes data(bytes);
    std::memset(data.data(), 3, bytes);
    std::vector<std::uint64_t> out(detail::chunk_count(bytes));
    double best = 0;
    for (int i = 0; i < rounds; ++i) {
        auto start = clock::now();
        detail::chunk_digests(data.bytes(), out);
        best = std::max(best, bytes / 1e9 / seconds_since(start));
    }
    return best;
}

/// A result that has nowhere to go is refused at once; no file is made yet.
void expect_writable(std::filesystem::path const& file) {
    file_descriptor const there(::open(file.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    if (there) return;
    auto why = last_system_error(errno);
    if (why == std::errc::no_such_file_or_directory) {
        auto const folder = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
        if (::access(folder.c_str(), W_OK | X_OK) == 0) return;
        why = last_system_error(errno);
    }
    throw_if(why, file.string() + ": cannot write the result");
}

}  // namespace

nlohmann::json measure_limits(std::filesystem::path const& dir, [[maybe_unused]] std::uint64_t size_bytes, std::ostream* progress) {
    auto say = [&](std::string const& line) {
        if (progress) *progress << "probe: " << line << '\n' << std::flush;
    };
    std::map<std::string, rates> sinks;
    {
        scratch_file file(dir);
        // The sinks take turns, since the disk may be shared; the first round writes the file and does not count.
#if VARVE_TOOL_WITH_POSIX
        measured_sink<posix::sink> posix{posix::sink()};
        posix.round(file, size_bytes, false);
#endif
#if VARVE_TOOL_WITH_URING
        std::optional<measured_sink<uring::sink>> ring;
        if (!uring::sink::available()) {
            ring.emplace(uring::sink());
            ring->round(file, size_bytes, false);
        }
#endif
#if VARVE_TOOL_WITH_ASIO
        std::optional<measured_sink<asio::sink>> lanes;
        if (!asio::sink::available()) {
            lanes.emplace(asio::sink());
            lanes->round(file, size_bytes, false);
        }
#endif
        for (int i = 0; i < rounds; ++i) {
            say("round " + std::to_string(i + 1) + " of " + std::to_string(rounds));
#if VARVE_TOOL_WITH_POSIX
            posix.round(file, size_bytes, true);
            sinks["posix"] = posix.reached();
#endif
#if VARVE_TOOL_WITH_URING
            if (ring) {
                ring->round(file, size_bytes, true);
                sinks["io_uring"] = ring->reached();
            }
#endif
#if VARVE_TOOL_WITH_ASIO
            if (lanes) {
                lanes->round(file, size_bytes, true);
                sinks["asio"] = lanes->reached();
            }
#endif
        }
    }
    nlohmann::json j = {{"sinks", nlohmann::json::object()}};
    rates best;
    for (auto const& [name, r] : sinks) {
        j["sinks"][name] = {{"write_gb_per_s", r.write}, {"read_gb_per_s", r.read}, {"describe", r.describe}};
        best.write = std::max(best.write, r.write);
        best.read = std::max(best.read, r.read);
    }
    j["direct"] = {{"write_gb_per_s", best.write}, {"read_gb_per_s", best.read}};
    say("copies and digests");
    j["copies"] = {{"memory_gb_per_s", memory_copy_rate()}};
    for (auto const& [name, rate] : gpu_copy_rates()) j["copies"][name] = rate;
    j["digest_gb_per_s"] = digest_rate();
    return j;
}

int probe(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    namespace po = boost::program_options;
    auto shown = option_group("Options");
    shown.add_options()("dir", po::value<std::string>()->value_name("D"), "the folder; it may hold anything")(
        "size-mb", po::value<double>()->value_name("M")->default_value(1024, "1024"), "size of the file that is written and read, MB (10^6 bytes)")(
        "json", po::value<std::string>()->value_name("F"), "write the rates to this file too, as a JSON object")("help", "this text");
    auto const values = parse_command_line(
        args, "Usage: varve probe --dir D [options]\nMeasures what a folder can take, GB/s (10^9 bytes); nothing is left behind.\n", shown, {}, out);
    if (!values) return 0;
    auto const& given = *values;
    if (!given.count("dir")) throw usage_error("--dir is missing; name the folder to measure");
    auto size_mb = given["size-mb"].as<double>();
    if (!(size_mb >= 1 && size_mb <= 1e6)) throw usage_error("--size-mb must be between 1 and 1000000");
    auto size = std::max<std::uint64_t>(block_unit_bytes, static_cast<std::uint64_t>(size_mb * 1e6) / block_unit_bytes * block_unit_bytes);

    if (given.count("json")) expect_writable(given["json"].as<std::string>());  // before all the work
    auto limits = measure_limits(given["dir"].as<std::string>(), size, &err);
    if (auto gpu = measure_gds(given["dir"].as<std::string>(), size))
        limits["sinks"]["gds"] = {{"write_gb_per_s", gpu->write}, {"read_gb_per_s", gpu->read}, {"describe", gpu->describe}};
    auto line = [&](std::string const& what, double rate) {
        out << std::left << std::setw(34) << what << std::right << std::fixed << std::setprecision(2) << std::setw(8) << rate << " GB/s\n";
    };
    line("direct write, sync included", limits["direct"]["write_gb_per_s"]);
    line("direct read", limits["direct"]["read_gb_per_s"]);
    for (auto const& [name, s] : limits["sinks"].items()) {
        line(name + " write", s["write_gb_per_s"]);
        line(name + " read", s["read_gb_per_s"]);
        out << "  " << s["describe"].get<std::string>() << '\n';
    }
    auto const& copies = limits["copies"];
    line("memory copy", copies["memory_gb_per_s"]);
    for (std::string way : {"device_to_host", "host_to_device", "device_to_device"})
        if (copies.contains(way + "_gb_per_s")) {
            auto title = "copy, " + way;
            std::replace(title.begin(), title.end(), '_', ' ');
            line(title, copies[way + "_gb_per_s"]);
        }
    line("digest, one thread", limits["digest_gb_per_s"]);
    if (given.count("json")) {
        auto path = given["json"].as<std::string>();
        file_descriptor fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), system_calls::kernel());
        auto text = limits.dump(2) + "\n";
        if (!fd || ::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()))
            throw_if(last_system_error(errno), path + ": cannot write the result");
    }
    return 0;
}

}  // namespace varve::tool
