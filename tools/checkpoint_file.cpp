#include "checkpoint_file.hpp"

#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "varve/detail/safetensors_read.hpp"
#include "varve/detail/safetensors_rules.hpp"
#include "varve/format/safetensors.hpp"

#include "pt_file.hpp"

namespace varve::tool {

namespace {

/// Both begin with their first record, whatever their name is.
bool is_zip(int fd) {
    std::array<char, 4> front{};
    return ::pread(fd, front.data(), front.size(), 0) == 4 && std::memcmp(front.data(), "PK\x03\x04", 4) == 0;
}

class safetensors_checkpoint final : public checkpoint_file {
public:
    explicit safetensors_checkpoint(file_descriptor fd) : fd_(std::move(fd)) {
        auto file = detail::read_safetensors(fd_.get());
        file_bytes_ = file.file_bytes();
        metadata_ = std::move(file.metadata);
        for (auto& t : file.tensors)
            tensors_.push_back({std::move(t.name), t.type, std::move(t.shape), t.end - t.begin, file.data_offset() + t.begin, t.header_index});
    }

    int fd() const noexcept override { return fd_.get(); }
    std::string_view format_name() const noexcept override { return "safetensors"; }
    std::uint64_t file_bytes() const noexcept override { return file_bytes_; }
    std::vector<file_tensor> const& tensors() const noexcept override { return tensors_; }
    metadata_map const& metadata() const noexcept override { return metadata_; }
    void read(file_tensor const& t, std::uint64_t offset_bytes, std::span<std::byte> to) const override {
        detail::read_exactly(fd_.get(), to.data(), to.size(), t.offset_bytes + offset_bytes);
    }

private:
    file_descriptor fd_;
    std::uint64_t file_bytes_ = 0;
    std::vector<file_tensor> tensors_;
    metadata_map metadata_;
};

}  // namespace

file_descriptor open_to_read(std::filesystem::path const& path) {
    // Without O_NONBLOCK a FIFO would wait for a writer.
    file_descriptor fd(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), system_calls::kernel());
    if (!fd) throw error(last_system_error(errno), std::strerror(errno));
    struct stat info{};
    if (::fstat(fd.get(), &info) != 0) throw error(last_system_error(errno), std::strerror(errno));
    if (S_ISDIR(info.st_mode))
        throw error(std::make_error_code(std::errc::is_a_directory), "is a folder; give a checkpoint file (varve ls lists those of a store)");
    if (!S_ISREG(info.st_mode)) throw error(errc::malformed, "is no regular file");
    return fd;
}

std::unique_ptr<file_format> format_of(int fd) {
    if (is_zip(fd)) return archive_format();
    return std::make_unique<safetensors>();
}

std::unique_ptr<checkpoint_file> open_checkpoint(std::filesystem::path const& path) {
    return at_path(path, [&]() -> std::unique_ptr<checkpoint_file> {
        auto fd = open_to_read(path);
        if (is_zip(fd.get())) return open_archive(std::move(fd));
        return std::make_unique<safetensors_checkpoint>(std::move(fd));
    });
}

unsigned reading_workers() {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (::sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return static_cast<unsigned>(std::clamp(CPU_COUNT(&set), 1, 16));
}

std::map<std::string, std::string> aliases_of(metadata_map const& metadata) {
    auto found = metadata.find(std::string(detail::aliases_key));
    if (found == metadata.end()) return {};
    if (found->second.size() > detail::max_aliases_bytes) throw error(errc::malformed, "its metadata varve.aliases is too large");
    auto json = nlohmann::json::parse(found->second, nullptr, false);
    std::map<std::string, std::string> out;
    if (!json.is_object()) throw error(errc::malformed, "its metadata varve.aliases is no JSON object");
    for (auto const& [alias, stored] : json.items()) {
        if (!stored.is_string()) throw error(errc::malformed, "its metadata varve.aliases has something else than names");
        out.emplace(alias, stored.get<std::string>());
    }
    return out;
}

}  // namespace varve::tool
