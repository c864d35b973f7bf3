#pragma once

#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "broken_device.hpp"
#include "device_model.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/image.hpp"
#include "varve/system.hpp"
#include "varve/ticket.hpp"

/// A training whose GPU breaks. It is a child of the test, which has not used CUDA: a process that has cannot hand it on to a child.
namespace varve_test {

/// What such a child exits with.
constexpr int no_gpu = 77, died = 3, wrong = 4;

/// The exit status of a child that does that; an exception is `wrong`.
inline int status_of_child(std::function<int()> const& work) {
    auto const child = ::fork();
    BOOST_TEST_REQUIRE(child >= 0);
    if (child == 0) {
        int code = wrong;
        try {
            code = work();
        } catch (std::exception const& e) {
            std::fprintf(stderr, "in the child: %s\n", e.what());
        }
        ::_exit(code);
    }
    int status = 0;
    BOOST_TEST_REQUIRE(::waitpid(child, &status, 0) == child);
    BOOST_TEST_REQUIRE(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/// Saves three steps, which `wait(ticket)` waits for, a fourth, and a fifth of a GPU that is broken: that one's ticket, or nothing where one
/// of the three failed.
template <class Checkpointer, class Wait>
std::optional<varve::ticket> save_until_the_gpu_breaks(Checkpointer& ck, device_model& model, cudaStream_t stream, Wait wait) {
    auto train = [&](std::uint64_t step) {
        ck.before_update_all({stream});
        for (std::size_t l = 0; l < model.layers(); ++l) model.update(l, step, stream);
    };
    for (std::uint64_t step = 1; step <= 3; ++step) {
        train(step);
        if (wait(ck.save(step, {}, {stream}))) return std::nullopt;
    }
    train(4);
    ck.save(4, {}, {stream});
    train(5);
    break_device(stream);
    return ck.save(5, {}, {stream});
}

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
