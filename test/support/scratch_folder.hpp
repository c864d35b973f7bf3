#pragma once

#include <fcntl.h>
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>
#include <vector>

#include "varve/concepts/sink.hpp"
#include "varve/system.hpp"

namespace varve_test {

/// A folder in the working directory (the build's: a disk, where /tmp may be none), gone with everything in it at the end.
class scratch_folder {
public:
    scratch_folder() {
        std::string name = "scratch-XXXXXX";
        if (!::mkdtemp(name.data())) throw std::system_error(errno, std::system_category(), "mkdtemp");
        path_ = std::filesystem::absolute(name);
        folder_ = {::open(path_.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC), varve::system_calls::kernel()};
    }
    scratch_folder(scratch_folder const&) = delete;
    scratch_folder& operator=(scratch_folder const&) = delete;
    ~scratch_folder() { std::filesystem::remove_all(path_); }

    int descriptor() const { return folder_.get(); }
    std::filesystem::path const& path() const { return path_; }

    /// For an image that stands in the file `index`.
    varve::open_request request(int index, std::uint64_t size) const { return {folder_.get(), std::to_string(index), size}; }

    std::vector<std::byte> content(int index) const {
        std::ifstream in(path_ / std::to_string(index), std::ios::binary);
        std::vector<std::byte> bytes;
        std::transform(std::istreambuf_iterator<char>(in), {}, std::back_inserter(bytes), [](char c) { return static_cast<std::byte>(c); });
        return bytes;
    }

private:
    std::filesystem::path path_;
    varve::file_descriptor folder_;
};

}  // namespace varve_test
