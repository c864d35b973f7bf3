#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <poll.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "varve/asio/transport.hpp"
#include "varve/asio/wire.hpp"
#include "varve/system.hpp"

/// A monitor whose part the test plays, message by message; on plain sockets, so that it shares nothing with what is tested.
namespace varve_test {

namespace wire = varve::asio::wire;

struct mapped_region {
    std::span<std::byte> memory;
    ~mapped_region() { ::munmap(memory.data(), memory.size()); }
};

/// One connection of a trainer. Everything blocks, for twenty seconds at most, and throws then.
class fake_connection {
public:
    explicit fake_connection(int fd) : fd_(fd, varve::system_calls::kernel()) {
        timeval const limit{20, 0};
        ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    }

    template <class Message>
    void say(Message const& m) {
        std::vector<std::byte> bytes;
        writer_.append(bytes, m);
        say_bytes(bytes);
    }
    void say_bytes(std::span<std::byte const> bytes, int descriptor = -1) {
        iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
        msghdr message{};
        message.msg_iov = &piece;
        message.msg_iovlen = 1;
        alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
        if (descriptor >= 0) {
            message.msg_control = control.data();
            message.msg_controllen = control.size();
            auto* head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET;
            head->cmsg_type = SCM_RIGHTS;
            head->cmsg_len = CMSG_LEN(sizeof(int));
            std::memcpy(CMSG_DATA(head), &descriptor, sizeof descriptor);
        }
        if (::sendmsg(fd_.get(), &message, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes.size())) throw std::runtime_error("the trainer has gone");
    }
    template <class Message>
    void say_with(Message const& m, int descriptor) {
        std::vector<std::byte> bytes;
        writer_.append(bytes, m);
        say_bytes(bytes, descriptor);
    }

    /// The next message; nothing at the connection's end.
    std::optional<wire::message> next() {
        std::array<std::byte, wire::header_bytes> head;
        if (!receive(head)) return std::nullopt;
        auto const h = reader_.accept(head);
        payload_.resize(h.payload_bytes);
        if (!receive(payload_)) throw std::runtime_error("a frame that ends early");
        return h.type;
    }
    /// The next message, which must be of that type.
    template <class Message>
    Message expect() {
        auto const type = next();
        if (type != Message::type)
            throw std::runtime_error("message " + (type ? std::to_string(static_cast<int>(*type)) : "end") + " where " +
                                     std::to_string(static_cast<int>(Message::type)) + " comes");
        return wire::decode<Message>(payload_);
    }
    bool says_nothing_for(std::chrono::milliseconds time) {
        pollfd p{fd_.get(), POLLIN, 0};
        return ::poll(&p, 1, static_cast<int>(time.count())) == 0;
    }

    /// Hello and welcome, of any purpose; the regions are mapped.
    wire::hello greet(wire::welcome const& answer = {}) {
        auto h = expect<wire::hello>();
        map(h);
        say(answer);
        return h;
    }
    void map(wire::hello const& h) {
        for (std::size_t i = 0; i < descriptors_.size(); ++i) {
            auto const size = h.region_bytes.at(i);
            void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptors_[i].get(), 0);
            if (memory == MAP_FAILED) throw std::runtime_error("a region cannot be mapped");
            regions.push_back(std::make_unique<mapped_region>(std::span(static_cast<std::byte*>(memory), size)));
        }
    }

    /// Takes one save whole, by reference or as payload, and gives back what was sent of its image.
    struct taken {
        wire::begin begin;
        std::vector<wire::block_ref> blocks;
        std::vector<std::byte> image;
        wire::commit commit;
    };
    taken take_save(wire::hello const& h, std::uint64_t credit_for_each = 0) { return take_save(expect<wire::begin>(), h, credit_for_each); }
    /// The same of one that has begun.
    taken take_save(wire::begin const& begun, wire::hello const& h, std::uint64_t credit_for_each = 0) {
        taken out;
        out.begin = begun;
        out.image.resize(h.image_bytes);
        for (;;) {
            auto const type = next();
            if (type == wire::message::block_ref) {
                auto const b = wire::decode<wire::block_ref>(payload_);
                auto const from = regions.at(b.region)->memory.subspan(b.region_offset, b.size);
                std::copy(from.begin(), from.end(), out.image.begin() + static_cast<std::ptrdiff_t>(b.image_offset));
                out.blocks.push_back(b);
            } else if (type == wire::message::block_data) {
                auto const b = wire::decode<wire::block_data>(payload_);
                std::copy(b.bytes.begin(), b.bytes.end(), out.image.begin() + static_cast<std::ptrdiff_t>(b.image_offset));
                most_unanswered = std::max(most_unanswered, unanswered += b.bytes.size());
                if (credit_for_each) {
                    unanswered -= b.bytes.size();
                    say(wire::credit{b.bytes.size()});
                }
            } else if (type == wire::message::commit) {
                out.commit = wire::decode<wire::commit>(payload_);
                return out;
            } else {
                throw std::runtime_error("a save that is not whole");
            }
        }
    }
    void finish(taken const& save, std::uint64_t sequence) {
        say(wire::crash_safe{save.begin.save});
        for (auto const& b : save.blocks) say(wire::release{b.region, b.region_offset});
        say(wire::durable{save.begin.save, sequence});
    }

    std::vector<varve::file_descriptor>& descriptors() { return descriptors_; }
    std::vector<std::unique_ptr<mapped_region>> regions;
    std::uint64_t unanswered = 0, most_unanswered = 0;

private:
    bool receive(std::span<std::byte> into) {
        for (std::size_t done = 0; done < into.size();) {
            iovec piece{into.data() + done, into.size() - done};
            msghdr message{};
            message.msg_iov = &piece;
            message.msg_iovlen = 1;
            alignas(cmsghdr) std::array<char, CMSG_SPACE(253 * sizeof(int))> control;
            message.msg_control = control.data();
            message.msg_controllen = control.size();
            auto const n = ::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && errno == ECONNRESET) return false;
            if (n < 0) throw std::runtime_error("the trainer says nothing");
            for (auto* head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head))
                for (std::size_t i = 0; i < (head->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
                    int fd = -1;
                    std::memcpy(&fd, CMSG_DATA(head) + i * sizeof fd, sizeof fd);
                    descriptors_.emplace_back(fd, varve::system_calls::kernel());
                }
            if (n == 0) return false;
            done += static_cast<std::size_t>(n);
        }
        return true;
    }

    varve::file_descriptor fd_;
    wire::frame_writer writer_;
    wire::frame_reader reader_{wire::peer::trainer};
    std::vector<std::byte> payload_;
    std::vector<varve::file_descriptor> descriptors_;
};

/// Listens on a Unix socket, or on a port of the loopback.
class fake_monitor {
public:
    explicit fake_monitor(std::filesystem::path path) : path_(std::move(path)) { listen(); }
    fake_monitor() { listen(); }
    ~fake_monitor() { die(); }

    varve::asio::address where() const {
        varve::asio::address a;
        a.path = path_;
        if (path_.empty()) {
            a.host = "127.0.0.1";
            a.port = port_;
        }
        return a;
    }
    void listen() {
        fd_ = {::socket(path_.empty() ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), varve::system_calls::kernel()};
        int bound = -1;
        if (path_.empty()) {
            sockaddr_in a{};
            a.sin_family = AF_INET;
            a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            a.sin_port = htons(port_);
            int const on = 1;
            ::setsockopt(fd_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            bound = ::bind(fd_.get(), reinterpret_cast<sockaddr*>(&a), sizeof a);
            socklen_t size = sizeof a;
            ::getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&a), &size);
            port_ = ntohs(a.sin_port);
        } else {
            sockaddr_un a{};
            a.sun_family = AF_UNIX;
            path_.string().copy(a.sun_path, sizeof a.sun_path - 1);
            bound = ::bind(fd_.get(), reinterpret_cast<sockaddr*>(&a), sizeof a);
        }
        if (bound != 0 || ::listen(fd_.get(), 8) != 0) throw std::runtime_error("cannot listen");
    }
    std::unique_ptr<fake_connection> accept() {
        pollfd p{fd_.get(), POLLIN, 0};
        if (::poll(&p, 1, 20'000) != 1) throw std::runtime_error("nobody connects");
        return std::make_unique<fake_connection>(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    }
    void die() {
        fd_.reset();
        if (!path_.empty()) ::unlink(path_.c_str());
    }

private:
    std::filesystem::path path_;
    std::uint16_t port_ = 0;
    varve::file_descriptor fd_;
};

}  // namespace varve_test
