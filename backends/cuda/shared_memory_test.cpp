#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <csignal>
#include <cstring>
#include <string>
#include <vector>

#include "broken_device.hpp"
#include "support.hpp"
#include "varve/cuda/shared_memory.hpp"

// In an executable of its own: a process that has used CUDA cannot hand it on to a child.

namespace {

using namespace varve_test;
constexpr std::size_t block = 4u << 20, blocks = 3;

/// A GPU's name, and room for one descriptor.
struct message_with_descriptor {
    message_with_descriptor() {
        head.msg_iov = &io;
        head.msg_iovlen = 1;
        head.msg_control = room;
        head.msg_controllen = sizeof room;
    }
    message_with_descriptor(message_with_descriptor const&) = delete;

    char name[32] = {};
    iovec io{name, sizeof name};
    alignas(cmsghdr) char room[CMSG_SPACE(sizeof(int))] = {};
    msghdr head{};
};

/// A process that fills GPU memory, hands it on, and dies in one way or another.
class filler {
public:
    enum class end { killed, its_gpu_broke };

    explicit filler(end how) {
        int ends[2];
        BOOST_TEST_REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        here_ = varve::file_descriptor(ends[0], varve::system_calls::kernel());
        pid_ = ::fork();
        BOOST_TEST_REQUIRE(pid_ >= 0);
        if (pid_ > 0) {
            ::close(ends[1]);
            return;
        }
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        ::signal(SIGABRT, SIG_DFL);
        try {
            fill_and_die(ends[1], how);
        } catch (std::exception const& e) {
            std::fprintf(stderr, "in the child: %s\n", e.what());
        }
        ::_exit(4);
    }
    filler(filler const&) = delete;

    struct handed {
        std::string device;
        varve::file_descriptor memory;
    };
    /// What it left, once it is dead; without a descriptor where it had no GPU.
    handed outlive() {
        message_with_descriptor m;
        handed out;
        if (::recvmsg(here_.get(), &m.head, MSG_CMSG_CLOEXEC) == static_cast<ssize_t>(sizeof m.name)) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m.head)), sizeof fd);
            out.memory = varve::file_descriptor(fd, varve::system_calls::kernel());
            out.device.assign(m.name, sizeof m.name);
        }
        int status = 0;
        ::waitpid(pid_, &status, 0);
        if (out.memory)
            BOOST_TEST_REQUIRE((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
        else
            BOOST_TEST_REQUIRE((WIFEXITED(status) && WEXITSTATUS(status) == 0), "it could not share its memory");
        return out;
    }

private:
    static void fill_and_die(int to, end how) {
        int gpus = 0;
        if (::cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) ::_exit(0);
        varve::cuda::shared_memory memory(blocks * block, block);
        auto const& region = memory.regions().front();
        if ((::fcntl(region.descriptor.get(), F_GETFD) & FD_CLOEXEC) == 0) ::_exit(4);
        std::vector<std::byte> bytes(region.memory.size());
        for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / block);
        varve::cuda::throw_if(::cudaMemcpy(region.memory.data(), bytes.data(), bytes.size(), cudaMemcpyDefault), "fill");
        message_with_descriptor m;
        if (memory.device().copy(m.name, sizeof m.name) != sizeof m.name) ::_exit(4);
        auto* const header = CMSG_FIRSTHDR(&m.head);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        int const fd = region.descriptor.get();
        std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
        if (how == end::its_gpu_broke) {
            break_device(nullptr);
            if (::cudaDeviceSynchronize() == cudaSuccess) ::_exit(4);
        }
        if (::sendmsg(to, &m.head, 0) < 0) ::_exit(4);
        ::raise(SIGKILL);
    }

    varve::file_descriptor here_;
    pid_t pid_ = 0;
};

}  // namespace

BOOST_AUTO_TEST_CASE(gpu_memory_that_is_shared_outlives_the_process_that_made_it) {
    // All of them before this process uses CUDA.
    filler killed(filler::end::killed), broken(filler::end::its_gpu_broke);
    for (auto* of : {&killed, &broken}) {
        auto left = of->outlive();
        if (!left.memory) return skip("no GPU here");
        varve::cuda::imported_memory memory(std::move(left.memory), blocks * block, left.device);
        auto const host = memory.host_memory(block);
        for (std::size_t b = blocks; b-- > 0;) {
            BOOST_TEST(!memory.read(b * block, {host.get(), block}));
            bool same = true;
            for (std::size_t i = 0; i < block && same; ++i) same = host.get()[i] == static_cast<std::byte>((b * block + i) * 7 + b);
            BOOST_TEST(same, "block " << b);
        }
    }
    int count = 0;
    BOOST_TEST_REQUIRE(::cudaGetDeviceCount(&count) == cudaSuccess);
    BOOST_CHECK_EXCEPTION(varve::cuda::imported_memory({}, block, "00000000000000000000000000000000"), varve::error,
                          [](varve::error const& e) { return e.code() == varve::errc::unsupported; });
    BOOST_CHECK_EXCEPTION(varve::cuda::shared_memory(block, 4096), varve::error,
                          [](varve::error const& e) { return e.code() == std::errc::invalid_argument; });
    BOOST_CHECK_EXCEPTION(varve::cuda::shared_memory(std::size_t{1} << 42, block), varve::error,
                          [](varve::error const& e) { return e.code() == std::errc::not_enough_memory; });
    BOOST_TEST(::cudaGetLastError() == cudaSuccess);
}
