#include <sys/socket.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "varve/error.hpp"

#include "socket_io.hpp"

namespace varve::asio::transport {

namespace {

/// The kernel's limit on descriptors in one message (SCM_MAX_FD). Source: unix(7).
constexpr std::size_t most_descriptors = 253;
/// What a peer may send before anybody takes it.
constexpr std::size_t most_untaken = 4096;
constexpr std::size_t most_pieces = 64;

attempt failure(int error) noexcept { return {outcome::failed, 0, last_system_error(error)}; }

class plain_io final : public socket_io {
public:
    plain_io(int descriptor, bool passes_descriptors) noexcept : fd_(descriptor), passes_descriptors_(passes_descriptors) {}

    attempt read(std::span<std::byte> into, std::vector<file_descriptor>& received) noexcept override {
        iovec piece{into.data(), into.size()};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        alignas(cmsghdr) std::array<char, CMSG_SPACE(most_descriptors * sizeof(int))> control;
        if (passes_descriptors_) {
            message.msg_control = control.data();
            message.msg_controllen = control.size();
        }
        for (;;) {
            auto const n = ::recvmsg(fd_, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return {outcome::wants_read};
            if (n < 0) return failure(errno);
            if (auto error = take(message, received)) return failure(error);
            if (n == 0) return {outcome::end};
            return {outcome::moved, static_cast<std::size_t>(n)};
        }
    }

    attempt write(std::span<iovec const> pieces, std::vector<int>& descriptors) noexcept override {
        msghdr message{};
        message.msg_iov = const_cast<iovec*>(pieces.data());
        message.msg_iovlen = std::min(pieces.size(), most_pieces);
        alignas(cmsghdr) std::array<char, CMSG_SPACE(most_descriptors * sizeof(int))> control;
        auto const along = passes_descriptors_ ? std::min(descriptors.size(), most_descriptors) : 0;
        iovec one_byte{};
        if (along > 0) {
            if (along < descriptors.size()) {
                // A byte for each message that carries some.
                one_byte = {pieces.front().iov_base, 1};
                message.msg_iov = &one_byte;
                message.msg_iovlen = 1;
            }
            auto const size = along * sizeof(int);
            message.msg_control = control.data();
            message.msg_controllen = CMSG_SPACE(size);
            auto* head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET;
            head->cmsg_type = SCM_RIGHTS;
            head->cmsg_len = CMSG_LEN(size);
            std::memcpy(CMSG_DATA(head), descriptors.data(), size);
        }
        for (;;) {
            auto const n = ::sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return {outcome::wants_write};
            if (n < 0) return failure(errno);
            if (along > 0) descriptors.erase(descriptors.begin(), descriptors.begin() + static_cast<std::ptrdiff_t>(along));
            return {outcome::moved, static_cast<std::size_t>(n)};
        }
    }

    void end() noexcept override { ::shutdown(fd_, SHUT_RDWR); }

private:
    static int take(msghdr& message, std::vector<file_descriptor>& received) noexcept try {
        int error = (message.msg_flags & MSG_CTRUNC) != 0 ? EMFILE : 0;
        for (auto* head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
            if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
            for (std::size_t i = 0; i < (head->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
                int fd = -1;
                std::memcpy(&fd, CMSG_DATA(head) + i * sizeof fd, sizeof fd);
                file_descriptor mine(fd, system_calls::kernel());
                if (received.size() >= most_untaken)
                    error = EPROTO;
                else
                    received.push_back(std::move(mine));
            }
        }
        return error;
    } catch (std::bad_alloc const&) {
        return ENOMEM;
    }

    int fd_;
    bool passes_descriptors_;
};

}  // namespace

std::unique_ptr<socket_io> make_plain_io(int descriptor, bool passes_descriptors) {
    return std::make_unique<plain_io>(descriptor, passes_descriptors);
}

}  // namespace varve::asio::transport
