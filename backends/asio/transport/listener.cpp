#include <boost/asio/error.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>

#include <netinet/in.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <cerrno>
#include <mutex>
#include <thread>

#include "varve/detail/text.hpp"
#include "varve/error.hpp"

#include "addresses.hpp"
#include "socket_io.hpp"

namespace varve::asio {

namespace {

constexpr int backlog = 64;

[[noreturn]] void fail(address const& at, int error_number, std::string const& advice) {
    auto const code = last_system_error(error_number);
    throw error(code, "cannot listen at " + varve::detail::printable(at.text()) + ": " + code.message() + "; " + advice);
}

/// Keeps others from taking the same path while a dead monitor's socket is looked at and replaced.
class folder_lock {
public:
    folder_lock(address const& at, std::filesystem::path const& folder)
        : fd_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), system_calls::kernel()) {
        if (!fd_) fail(at, errno, "give a path in a folder that is there");
        for (int tries = 0; ::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0; ++tries) {
            if (errno != EWOULDBLOCK || tries == 200) fail(at, errno, "somebody holds a lock on its folder");
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
    }

private:
    file_descriptor fd_;
};

/// Whether somebody listens at the socket; false where whoever made it is gone.
bool is_listened_to(sockaddr_un const& where) noexcept {
    file_descriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), system_calls::kernel());
    return fd && (::connect(fd.get(), reinterpret_cast<sockaddr const*>(&where), sizeof where) == 0 || (errno != ECONNREFUSED && errno != ENOENT));
}

file_descriptor listen_unix(address const& at) {
    auto const where = transport::unix_address(at.path);
    auto const folder = at.path.has_parent_path() ? at.path.parent_path() : std::filesystem::path(".");
    folder_lock lock(at, folder);
    struct stat info{};
    if (::lstat(at.path.c_str(), &info) == 0) {
        if (!S_ISSOCK(info.st_mode)) fail(at, EEXIST, "something that is no socket is there; give another path");
        if (is_listened_to(where)) fail(at, EADDRINUSE, "another monitor listens there");
        ::unlink(at.path.c_str());
    }
    file_descriptor fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), system_calls::kernel());
    // Before it has a name: the file takes its mode from here, and is never open to others, not for a moment.
    if (!fd || ::fchmod(fd.get(), 0600) != 0 || ::bind(fd.get(), reinterpret_cast<sockaddr const*>(&where), sizeof where) != 0)
        fail(at, errno, "check the folder's permissions");
    if (::listen(fd.get(), backlog) != 0) fail(at, errno, "give another path");
    return fd;
}

file_descriptor listen_tcp(address& at, bool secured) {
    auto const found = transport::resolve(at, true);
    if (!secured) transport::expect_loopback(at, found->ai_addr);
    file_descriptor fd(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), system_calls::kernel());
    int const on = 1;
    if (!fd || ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 || ::bind(fd.get(), found->ai_addr, found->ai_addrlen) != 0 ||
        ::listen(fd.get(), backlog) != 0)
        fail(at, errno, "give another host or port");
    sockaddr_storage own{};
    socklen_t size = sizeof own;
    if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&own), &size) != 0) fail(at, errno, "give another host or port");
    at.port = ntohs(own.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(own).sin6_port : reinterpret_cast<sockaddr_in&>(own).sin_port);
    return fd;
}

}  // namespace

class listener::impl : public std::enable_shared_from_this<listener::impl> {
public:
    impl(boost::asio::any_io_executor executor, address at, std::shared_ptr<tls_context const> tls)
        : at_(std::move(at)), tls_(std::move(tls)), descriptor_(std::move(executor)) {
        auto fd = at_.is_unix() ? listen_unix(at_) : listen_tcp(at_, tls_ != nullptr);
        if (at_.is_unix()) ::lstat(at_.path.c_str(), &made_);
        descriptor_.assign(fd.release());
    }

    void accept(boost::asio::any_io_executor executor, std::function<void(std::error_code, std::unique_ptr<stream>)> done) {
        std::lock_guard lock(mutex_);
        descriptor_.async_wait(descriptor_.wait_read, [self = shared_from_this(), executor, done](boost::system::error_code ec) {
            if (ec) return done(ec, nullptr);
            auto fd = self->take();
            if (!fd) {
                // Gone again before it was its turn.
                if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ECONNABORTED) return self->accept(executor, done);
                return done(last_system_error(errno), nullptr);
            }
            std::error_code failed;
            std::unique_ptr<stream> made;
            try {
                made = make_stream(executor, std::move(fd), self->tls_);
            } catch (error const& e) {
                failed = e.code();
            } catch (std::exception const&) {
                failed = std::make_error_code(std::errc::not_enough_memory);
            }
            done(failed, std::move(made));
        });
    }

    void close() noexcept {
        std::lock_guard lock(mutex_);
        struct stat now{};
        // Only what is still ours: somebody may have put another socket there. And while it listens, so that nobody puts one there now.
        if (at_.is_unix() && made_.st_ino != 0 && ::lstat(at_.path.c_str(), &now) == 0 && now.st_ino == made_.st_ino && now.st_dev == made_.st_dev)
            ::unlink(at_.path.c_str());
        made_ = {};
        boost::system::error_code ignored;
        descriptor_.close(ignored);
    }

    address const& where() const noexcept { return at_; }

private:
    file_descriptor take() {
        std::lock_guard lock(mutex_);
        return {::accept4(descriptor_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK), system_calls::kernel()};
    }

    address at_;
    std::shared_ptr<tls_context const> tls_;
    std::mutex mutex_;  ///< close() comes from any thread
    boost::asio::posix::stream_descriptor descriptor_;
    struct stat made_{};
};

listener::listener(boost::asio::any_io_executor executor, address const& at, std::shared_ptr<tls_context const> tls)
    : impl_(std::make_shared<impl>(std::move(executor), at, std::move(tls))) {}
listener::~listener() { close(); }
void listener::accept(boost::asio::any_io_executor executor, std::function<void(std::error_code, std::unique_ptr<stream>)> done) {
    impl_->accept(std::move(executor), std::move(done));
}
void listener::close() noexcept { impl_->close(); }
address const& listener::where() const noexcept { return impl_->where(); }

}  // namespace varve::asio
