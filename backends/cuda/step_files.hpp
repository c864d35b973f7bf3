#pragma once

#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <unistd.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "varve/format/safetensors.hpp"
#include "varve/image.hpp"
#include "varve/system.hpp"

namespace varve_test {

/// The newest step of a device_model's checkpoints, each of which is whole and says its step in its last bytes.
inline std::uint64_t newest_of_whole_files(std::filesystem::path const& dir) {
    std::uint64_t newest = 0;
    for (auto const& entry : std::filesystem::directory_iterator(dir)) {
        auto const name = entry.path().filename().string();
        if (!name.starts_with("step-")) continue;
        auto const step = std::stoull(name.substr(5, 12));
        newest = std::max<std::uint64_t>(newest, step);
        BOOST_TEST_CONTEXT(name) {
            varve::file_descriptor fd(::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC), varve::system_calls::kernel());
            BOOST_CHECK_NO_THROW(varve::safetensors{}.verify(fd.get(), 2));
            auto const size = std::filesystem::file_size(entry.path());
            std::vector<std::byte> last(4 * varve::block_unit_bytes);
            BOOST_TEST_REQUIRE(size > last.size());
            BOOST_TEST_REQUIRE(::pread(fd.get(), last.data(), last.size(), static_cast<off_t>(size - last.size())) ==
                               static_cast<ssize_t>(last.size()));
            BOOST_TEST(std::memcmp(last.data(), last.data() + 1, last.size() - 1) == 0);
            BOOST_TEST(std::to_integer<std::uint64_t>(last[0]) == step);
        }
    }
    return newest;
}

}  // namespace varve_test
