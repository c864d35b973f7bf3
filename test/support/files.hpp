#pragma once

#include <fcntl.h>
#include <unistd.h>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "varve/format/safetensors.hpp"

namespace varve_test {

/// A folder that is gone with this.
class temporary_folder {
public:
    temporary_folder() {
        auto pattern = (std::filesystem::temp_directory_path() / "varve-test-XXXXXX").string();
        if (!::mkdtemp(pattern.data())) throw std::runtime_error("no temporary folder");
        path_ = pattern;
    }
    temporary_folder(temporary_folder const&) = delete;
    temporary_folder& operator=(temporary_folder const&) = delete;
    ~temporary_folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    std::filesystem::path const& path() const noexcept { return path_; }

private:
    std::filesystem::path path_;
};

inline void write_file(std::filesystem::path const& path, std::string_view bytes) {
    int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) throw std::runtime_error("cannot write " + path.string());
    while (!bytes.empty()) {
        auto n = ::write(fd, bytes.data(), bytes.size());
        if (n <= 0) throw std::runtime_error("cannot write " + path.string());
        bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    ::close(fd);
}

inline std::string read_file(std::filesystem::path const& path) {
    std::string out(std::filesystem::file_size(path), '\0');
    int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    std::size_t done = 0;
    while (done < out.size()) {
        auto n = ::pread(fd, out.data() + done, out.size() - done, static_cast<off_t>(done));
        if (n <= 0) throw std::runtime_error("cannot read " + path.string());
        done += static_cast<std::size_t>(n);
    }
    ::close(fd);
    return out;
}

/// A descriptor to read a file by.
inline varve::file_descriptor open_file(std::filesystem::path const& path) {
    return {::open(path.c_str(), O_RDONLY | O_CLOEXEC), varve::system_calls::kernel()};
}

/// The checkpoint of a state in host memory, as the bytes of its file.
inline std::string checkpoint_bytes(varve::state const& s, varve::commit_values const& values,
                                    varve::safetensors const& format = varve::safetensors{}) {
    auto img = format.lay_out(s);
    std::string out(img.size_bytes, '\0');
    auto* bytes = reinterpret_cast<std::byte*>(out.data());
    for (auto const& p : img.tensors) varve::detail::gather(s.layers[p.layer].tensors[p.tensor], 0, p.size_bytes, bytes + p.offset_bytes);
    std::vector<std::uint64_t> digests(varve::detail::chunk_count(img.data_bytes()));
    varve::detail::chunk_digests({bytes + img.header_bytes, img.data_bytes()}, digests);
    auto header = format.header(s, img, values, digests);
    out.replace(0, header.size(), reinterpret_cast<char const*>(header.data()), header.size());
    return out;
}

/// A safetensors file from its JSON and its data.
inline std::string file_of(std::string_view json, std::string_view data = {}) {
    std::string out;
    for (unsigned i = 0; i < 8; ++i) out += static_cast<char>(json.size() >> 8 * i);
    out += json;
    return out += data;
}

/// A state that owns its tensors' memory, filled from a seed.
class owned_state {
public:
    varve::state state;

    varve::tensor& add(std::string layer_name, std::string name, varve::dtype type, std::vector<std::int64_t> shape, std::uint32_t seed = 1) {
        if (state.layers.empty() || state.layers.back().name != layer_name) state.layers.push_back({layer_name, {}});
        varve::tensor t{std::move(name), type, std::move(shape), nullptr, {}, varve::memory_kind::host};
        auto& bytes = memory_.emplace_back(t.size_bytes() + 1);
        for (auto& b : bytes) b = static_cast<std::byte>((seed = seed * 1664525u + 1013904223u) >> 24);
        t.data = bytes.data();
        state.layers.back().tensors.push_back(std::move(t));
        return state.layers.back().tensors.back();
    }

    /// Every tensor's row-major bytes, in the order of the layers.
    std::string bytes() const {
        std::string out;
        for (auto const& l : state.layers)
            for (auto const& t : l.tensors) {
                auto at = out.size();
                out.resize(at + t.size_bytes());
                varve::detail::gather(t, 0, t.size_bytes(), reinterpret_cast<std::byte*>(out.data()) + at);
            }
        return out;
    }
    void clear() {
        for (auto& m : memory_) std::fill(m.begin(), m.end(), std::byte{0});
    }

private:
    std::vector<std::vector<std::byte>> memory_;
};

}  // namespace varve_test
