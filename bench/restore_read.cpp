// How fast a checkpoint comes back from the page cache, digests checked and not, and from the disk, in turns with direct reads of the same file.
// restore_read [FILE [--keep]]: writes a checkpoint of about 1 GB there (deleted afterwards unless --keep) and restores it into live tensors.

#include <fcntl.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "varve/format/safetensors.hpp"

#include "timing.hpp"

namespace {

using varve_bench::median;

constexpr std::size_t tensor_count = 64;
constexpr std::int64_t rows = 2000;
constexpr std::int64_t columns = 2048;

void write_all(int fd, void const* data, std::size_t size, std::uint64_t offset) {
    for (std::size_t done = 0; done < size;) {
        auto n = ::pwrite(fd, static_cast<char const*>(data) + done, size - done, static_cast<off_t>(offset + done));
        if (n <= 0) throw std::runtime_error("cannot write");
        done += static_cast<std::size_t>(n);
    }
}

/// How a plain reader reads a file.
struct reading {
    unsigned threads;
    std::size_t bytes;  ///< at once
};

void read_directly(std::string const& path, std::uint64_t size_bytes, reading const& how) {
    varve::file_descriptor const fd(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC), varve::system_calls::kernel());
    if (!fd) throw std::runtime_error("no direct reads there");
    varve::detail::for_each_index((size_bytes + how.bytes - 1) / how.bytes, how.threads, [&] {
        return [&, memory = varve::detail::aligned_buffer(how.bytes)](std::uint64_t i) {
            if (::pread(fd.get(), memory.data(), how.bytes, static_cast<off_t>(i * how.bytes)) <= 0) throw std::runtime_error("cannot read");
        };
    });
}

template <class Call>
double seconds_of(Call call) {
    auto const begin = varve_bench::clock_type::now();
    call();
    return varve_bench::ms_since(begin) / 1e3;
}

}  // namespace

int main(int argc, char** argv) {
    std::string const path = argc > 1 ? argv[1] : (std::filesystem::temp_directory_path() / "varve-restore-read.safetensors").string();
    bool const keep = argc > 2 && std::string(argv[2]) == "--keep";

    varve::state state;
    std::vector<std::vector<float>> memory(tensor_count, std::vector<float>(static_cast<std::size_t>(rows * columns)));
    state.layers.push_back({"layer", {}});
    std::uint32_t x = 1;
    for (std::size_t i = 0; i < tensor_count; ++i) {
        for (auto& v : memory[i]) v = static_cast<float>(x = x * 1664525u + 1013904223u);
        state.layers[0].tensors.push_back({"model.t" + std::to_string(i), varve::dtype::F32, {rows, columns}, memory[i].data(), {}, {}});
    }
    varve::safetensors const format;
    auto const img = format.lay_out(state);
    int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) {
        std::fprintf(stderr, "cannot write %s\n", path.c_str());
        return 1;
    }
    std::vector<std::uint64_t> chunks;
    for (auto const& p : img.tensors) write_all(fd, state.layers[p.layer].tensors[p.tensor].data, p.size_bytes, p.offset_bytes);
    {
        std::vector<std::byte> piece(varve::digest_chunk_bytes);
        for (std::uint64_t at = img.header_bytes; at < img.size_bytes; at += piece.size()) {
            auto n = static_cast<std::size_t>(std::min<std::uint64_t>(piece.size(), img.size_bytes - at));
            varve::detail::read_exactly(fd, piece.data(), n, at);
            chunks.push_back(varve::detail::digest(std::span(piece).first(n)));
        }
    }
    auto header = format.header(state, img, {1, 1, {}}, chunks);
    write_all(fd, header.data(), header.size(), 0);

    double const gigabytes = static_cast<double>(img.size_bytes) / 1e9;
    auto measure = [&](char const* what, auto call) {
        std::vector<double> seconds;
        for (int i = 0; i < 7; ++i) seconds.push_back(seconds_of(call));
        std::printf("%-44s %6.2f GB/s (median of 7; best %.2f)\n", what, gigabytes / median(seconds), gigabytes / *std::ranges::min_element(seconds));
    };
    unsigned const cores = std::max(1u, std::thread::hardware_concurrency());
    for (unsigned workers : {1u, cores}) {
        auto label = [&](char const* what) { return std::string(what) + ", " + std::to_string(workers) + (workers == 1 ? " thread" : " threads"); };
        measure(label("restore, digests checked").c_str(), [&] { format.restore(fd, state, {workers, true, false, false}); });
        measure(label("restore, no digests").c_str(), [&] { format.restore(fd, state, {workers, false, false, false}); });
        measure(label("verify").c_str(), [&] { format.verify(fd, workers); });
    }
    ::fsync(fd);
    for (auto const& how : {reading{4, 8u << 20}, reading{16, 4u << 20}, reading{16, 8u << 20}}) {
        auto const cold = [&](auto call) {
            ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            return seconds_of(call);
        };
        std::vector<double> restored, read, ratios;
        for (int i = 0; i < 9; ++i) {
            restored.push_back(cold([&] { format.restore(fd, state, {cores, true, false, false}); }));
            read.push_back(cold([&] { read_directly(path, img.size_bytes, how); }));
            ratios.push_back(read.back() / restored.back());
        }
        std::printf(
            "restore, digests checked, cold                 %6.2f GB/s: %.2f of direct reads by %u threads, %zu MiB at once (%.2f GB/s; medians of 9 "
            "in turn)\n",
            gigabytes / median(restored), median(ratios), how.threads, how.bytes >> 20, gigabytes / median(read));
    }
    ::close(fd);
    if (!keep) std::filesystem::remove(path);
    return 0;
}
