#include <boost/test/unit_test.hpp>

#include <grp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cstdlib>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>

#include "raw_peer.hpp"
#include "support.hpp"

/// Who may talk to a monitor on its Unix socket.
namespace varve_test {

namespace {

constexpr uid_t nobody = 65534;

enum outcome { answered, no_change_of_user, not_connected, ended_without_a_word };

/// What a process of that user gets for a HELLO. Between fork and exit it does what a process with threads may do there.
outcome greet_as(uid_t user, std::filesystem::path const& socket) {
    std::vector<std::byte> hello;
    wire::hello h;
    h.purpose = wire::purpose::status;
    wire::frame_writer{}.append(hello, h);
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    socket.string().copy(to.sun_path, sizeof to.sun_path - 1);
    auto const pid = ::fork();
    if (pid == 0) {
        if (user != ::geteuid() && (::setgroups(0, nullptr) != 0 || ::setgid(user) != 0 || ::setuid(user) != 0)) ::_exit(no_change_of_user);
        int const fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        timeval const limit{5, 0};
        ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        if (::connect(fd, reinterpret_cast<sockaddr const*>(&to), sizeof to) != 0) ::_exit(not_connected);
        // It may have been ended by now.
        auto const sent = ::send(fd, hello.data(), hello.size(), MSG_NOSIGNAL);
        std::byte answer{};
        auto const got = ::recv(fd, &answer, 1, 0);
        ::_exit(sent > 0 && got == 1 ? answered : ended_without_a_word);
    }
    int status = 0;
    ::waitpid(pid, &status, 0);
    if (!WIFEXITED(status)) throw std::runtime_error("the other process came to no end");
    return static_cast<outcome>(WEXITSTATUS(status));
}

/// A folder that every user may walk into, whatever stands above the working directory.
struct open_folder {
    open_folder() {
        auto pattern = (std::filesystem::temp_directory_path() / "varve-access-XXXXXX").string();
        if (!::mkdtemp(pattern.data())) throw std::runtime_error("no temporary folder");
        path = pattern;
        ::chmod(path.c_str(), 0711);
    }
    ~open_folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    std::filesystem::path path;
};

}  // namespace

BOOST_AUTO_TEST_CASE(another_user_gets_no_word_even_where_the_socket_was_opened_to_all) {
    if (::geteuid() != 0) return skip("only root can be another user");
    open_folder folder;
    varve::asio::monitor_options o;
    o.dir = folder.path / "stores";
    o.listen = {varve::asio::parse_address("unix:" + (folder.path / "s").string())};
    o.memory_limit_bytes = 64u << 20;
    running_monitor monitor(o);
    auto const socket = monitor.where().path;
    struct stat info{};
    BOOST_TEST_REQUIRE(::stat(socket.c_str(), &info) == 0);
    BOOST_TEST((info.st_mode & 0777) == 0600u);
    auto const shut = greet_as(nobody, socket);
    if (shut == no_change_of_user) return skip("this root may not become another user");
    BOOST_TEST(shut == not_connected);
    BOOST_TEST_REQUIRE(::chmod(socket.c_str(), 0666) == 0);
    BOOST_TEST(greet_as(nobody, socket) == ended_without_a_word);
    // Nobody else is worse off.
    BOOST_TEST(greet_as(0, socket) == answered);
}

}  // namespace varve_test
