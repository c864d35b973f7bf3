#pragma once

#include <boost/asio/io_context.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "varve/asio/monitor/monitor.hpp"
#include "varve/asio/transport.hpp"
#include "varve/asio/wire.hpp"
#include "varve/detail/digest.hpp"
#include "varve/error.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/state.hpp"

/// The protocol, spoken by hand: what a monitor does with messages that no client of ours would send can only be seen so.
namespace varve_test {

namespace wire = varve::asio::wire;
using namespace std::chrono_literals;

/// A monitor on a thread of its own, until it is stopped or gone.
class running_monitor {
public:
    explicit running_monitor(varve::asio::monitor_options options)
        : monitor_(std::move(options)), thread_([this] {
              monitor_.run();
              over_ = true;
          }) {}
    ~running_monitor() {
        monitor_.stop();
        thread_.join();
    }
    varve::asio::monitor& get() { return monitor_; }
    varve::asio::address where() const { return monitor_.where().front(); }
    bool over() const { return over_; }

private:
    varve::asio::monitor monitor_;
    std::atomic<bool> over_ = false;
    std::thread thread_;
};

/// One connection to a monitor. Everything blocks, for ten seconds at most.
class raw_peer {
public:
    explicit raw_peer(varve::asio::address const& to, std::shared_ptr<varve::asio::tls_context const> tls = nullptr)
        : stream_(to.is_unix() ? varve::asio::make_stream(context_.get_executor(), connected(to.path))
                               : varve::asio::connect(context_.get_executor(), to, std::move(tls), 5s)) {}

    template <class Message>
    void send(Message const& m, std::vector<int> descriptors = {}) {
        std::vector<std::byte> bytes;
        writer_.append(bytes, m);
        send_bytes(bytes, std::move(descriptors));
    }
    void send_bytes(std::span<std::byte const> bytes, std::vector<int> descriptors = {}) {
        bool done = false;
        stream_->write(
            std::span(&bytes, 1),
            [&](std::error_code ec, std::size_t) {
                done = true;
                write_error = ec;
            },
            std::move(descriptors));
        wait(done);
    }

    /// The next message of that type; PING is answered, RELEASE, CREDIT and other notices are counted. A refusal, or the
    /// connection's end, ends the wait with an exception that has its words.
    template <class Message>
    Message expect() {
        for (;;) {
            auto const [type, payload] = next();
            std::optional<Message> found;
            wire::decode(type, payload, [&](auto const& m) {
                using got = std::remove_cvref_t<decltype(m)>;
                if constexpr (std::same_as<got, Message>) found = m;
                note(m);
            });
            if (found) return *found;
        }
    }
    /// The words with which the monitor ends the connection.
    std::string refusal() {
        try {
            for (;;) expect<wire::ping>();
        } catch (std::runtime_error const& e) {
            return e.what();
        }
    }
    /// Whether a message came within the time; it is not taken.
    bool hears_within(std::chrono::milliseconds limit) {
        auto const until = std::chrono::steady_clock::now() + limit;
        start_reading();
        while (buffered_ == 0 && !ended_ && std::chrono::steady_clock::now() < until) step(20ms);
        return buffered_ > 0 || ended_;
    }
    /// Says HELLO as somebody who trains nothing.
    wire::welcome greet(wire::purpose purpose, bool relayed = false) {
        wire::hello hello;
        hello.purpose = purpose;
        hello.store = "run";
        hello.relayed = relayed;
        send(hello);
        return expect<wire::welcome>();
    }
    std::vector<varve::file_descriptor> descriptors() { return stream_->take_descriptors(); }
    void close() { stream_.reset(); }
    /// Of a Unix socket: what is sent to here from now on is refused, as where this process is gone; what is sent from here goes on.
    void stop_listening() { ::shutdown(socket_, SHUT_RD); }

    std::error_code write_error;
    std::size_t released = 0;
    std::set<std::uint64_t> on_loan;  ///< places in the pool
    std::uint64_t credit = 0;
    std::optional<wire::failed> failure;  ///< the last

private:
    varve::file_descriptor connected(std::filesystem::path const& path) {
        varve::file_descriptor out(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), varve::system_calls::kernel());
        sockaddr_un at{.sun_family = AF_UNIX, .sun_path = {}};
        path.string().copy(at.sun_path, sizeof at.sun_path - 1);
        if (::connect(out.get(), reinterpret_cast<sockaddr const*>(&at), sizeof at) != 0)
            throw std::runtime_error("cannot connect to " + path.string());
        socket_ = out.get();
        return out;
    }

    void note(wire::release const& r) {
        ++released;
        on_loan.erase(r.region_offset);
    }
    void note(wire::credit const& c) { credit += c.bytes; }
    void note(wire::welcome const& w) { credit = w.credit_bytes; }
    void note(wire::failed const& f) { failure = f; }
    void note(wire::ping const&) { send(wire::pong{}); }
    void note(wire::refusal const& r) { throw std::runtime_error(r.text); }
    template <class Message>
    void note(Message const&) {}

    void step(std::chrono::milliseconds time) {
        context_.restart();
        context_.run_one_for(time);
    }
    void wait(bool const& done) {
        for (int i = 0; i < 200 && !done; ++i) step(50ms);
        if (!done) throw std::logic_error("the monitor does not answer");
    }
    void start_reading() {
        if (reading_ || ended_ || buffered_ > 0) return;
        reading_ = true;
        stream_->read(buffer_, 1, [this](std::error_code ec, std::size_t n) {
            reading_ = false;
            buffered_ = n;
            ended_ = static_cast<bool>(ec);
        });
    }
    void read(std::span<std::byte> into) {
        while (!into.empty()) {
            start_reading();
            for (int i = 0; i < 200 && buffered_ == 0 && !ended_; ++i) step(50ms);
            if (buffered_ == 0) throw std::runtime_error(ended_ ? "the connection has ended" : "the monitor does not answer");
            auto const n = std::min(buffered_, into.size());
            std::memcpy(into.data(), buffer_.data(), n);
            std::memmove(buffer_.data(), buffer_.data() + n, buffered_ - n);
            buffered_ -= n;
            into = into.subspan(n);
        }
    }
    std::pair<wire::message, std::span<std::byte const>> next() {
        std::array<std::byte, wire::header_bytes> head;
        read(head);
        auto const h = reader_.accept(head);
        payload_.resize(h.payload_bytes);
        read(payload_);
        return {h.type, payload_};
    }

    boost::asio::io_context context_;
    int socket_ = -1;  ///< the stream's
    std::unique_ptr<varve::asio::stream> stream_;
    wire::frame_writer writer_;
    wire::frame_reader reader_{wire::peer::monitor};
    std::vector<std::byte> buffer_ = std::vector<std::byte>(1u << 20), payload_;
    std::size_t buffered_ = 0;
    bool reading_ = false, ended_ = false;
};

/// A state of a few tensors, and saves of it by hand.
class raw_trainer {
public:
    static constexpr std::size_t block_bytes = 4u << 20;

    /// `images`: how many the pool holds; 0: none, blocks go as payload. `floats`: of its larger tensor.
    raw_trainer(varve::asio::address const& to, std::string store, std::size_t images, std::shared_ptr<varve::asio::tls_context const> tls = nullptr,
                std::size_t floats = 2'600'007)
        : peer(to, std::move(tls)), data_(floats), other_(floats / 37) {
        s.layers = {{"a", {{"a.w", varve::dtype::F32, {static_cast<std::int64_t>(data_.size())}, data_.data(), {}}}},
                    {"b", {{"b.w", varve::dtype::U8, {static_cast<std::int64_t>(other_.size())}, other_.data(), {}}}}};
        layout = varve::safetensors().lay_out(s);
        varve::block_map map(layout, s, block_bytes);
        plans.assign(map.blocks().begin(), map.blocks().end());
        hello.store = std::move(store);
        hello.made_by = "test";
        hello.extension = ".safetensors";
        hello.layers = s.layers;
        hello.image_bytes = layout.size_bytes;
        hello.header_bytes = layout.header_bytes;
        hello.block_bytes = block_bytes;
        if (images == 0) return;
        pool_bytes = images * plans.size() * block_bytes;
        hello.region_bytes = {pool_bytes};
        memory = {::memfd_create("pool", MFD_CLOEXEC | MFD_ALLOW_SEALING), varve::system_calls::kernel()};
        if (::ftruncate(memory.get(), static_cast<off_t>(pool_bytes)) != 0 || ::fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
            throw std::runtime_error("no pool");
        pool = static_cast<std::byte*>(::mmap(nullptr, pool_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0));
    }
    ~raw_trainer() {
        if (pool) ::munmap(pool, pool_bytes);
    }

    wire::welcome greet() {
        peer.send(hello, pool ? std::vector<int>{memory.get()} : std::vector<int>{});
        return peer.expect<wire::welcome>();
    }

    /// The tensors as they are at that step.
    void set(std::uint64_t step) {
        for (std::size_t i = 0; i < data_.size(); ++i) data_[i] = static_cast<float>(i + step);
        for (std::size_t i = 0; i < other_.size(); ++i) other_[i] = static_cast<std::uint8_t>(i * step);
    }
    std::vector<std::byte> block(varve::block_plan const& plan) const {
        std::vector<std::byte> bytes(plan.size_bytes);
        varve::block_map map(layout, s, block_bytes);
        for (auto const& b : map.blocks()) {
            if (b.offset_bytes != plan.offset_bytes) continue;
            for (auto const& part : map.parts(b))
                std::memcpy(bytes.data() + part.range.buffer_offset_bytes,
                            static_cast<std::byte const*>(part.range.source->data) + part.range.source_offset_bytes, part.range.size_bytes);
        }
        return bytes;
    }
    std::vector<std::uint64_t> digests() const {
        std::vector<std::uint64_t> out(varve::detail::chunk_count(layout.data_bytes()));
        for (auto const& plan : plans)
            varve::detail::chunk_digests(block(plan), std::span(out).subspan((plan.offset_bytes - layout.header_bytes) / varve::digest_chunk_bytes));
        return out;
    }

    void begin(std::uint64_t save, std::uint64_t step) { peer.send(wire::begin{save, step}); }
    /// Block `index` of the image; from the pool's place `at`, counted in blocks, where there is one.
    void send_block(std::uint64_t save, std::size_t index, std::size_t at = 0) {
        auto const bytes = block(plans[index]);
        if (!pool) return peer.send(wire::block_data{save, plans[index].offset_bytes, bytes});
        std::memcpy(pool + at * block_bytes, bytes.data(), bytes.size());
        peer.on_loan.insert(at * block_bytes);
        peer.send(wire::block_ref{save, plans[index].offset_bytes, static_cast<std::uint32_t>(bytes.size()), 0, at * block_bytes});
    }
    void send_blocks(std::uint64_t save, std::size_t image = 0) {
        for (std::size_t i = 0; i < plans.size(); ++i) send_block(save, i, image * plans.size() + i);
    }
    void commit(std::uint64_t save) { peer.send(wire::commit{save, {{"who", "test"}}, pool ? std::vector<std::uint64_t>{} : digests()}); }
    /// An image of the pool of which nothing is on loan any more.
    std::size_t free_image() {
        auto const image_bytes = plans.size() * block_bytes;
        for (;; peer.expect<wire::release>())
            for (std::size_t image = 0; image < pool_bytes / image_bytes; ++image) {
                auto const first = peer.on_loan.lower_bound(image * image_bytes);
                if (first == peer.on_loan.end() || *first >= (image + 1) * image_bytes) return image;
            }
    }
    /// Everything of a save but the answers.
    void save(std::uint64_t number, std::uint64_t step, std::size_t image = 0) {
        set(step);
        begin(number, step);
        send_blocks(number, image);
        commit(number);
    }

    /// Whether the file, or memory, holds the tensors of that step, digests and all.
    bool holds(int fd, std::uint64_t step) {
        auto const here = data_;
        auto const there = other_;
        set(step);
        auto const data = data_;
        auto const other = other_;
        std::fill(data_.begin(), data_.end(), 0.f);
        varve::safetensors().restore(fd, s, {});
        bool const same = data_ == data && other_ == other && varve::safetensors().identify(fd).step == step;
        data_ = here;
        other_ = there;
        return same;
    }
    bool holds(std::filesystem::path const& file, std::uint64_t step) {
        varve::file_descriptor fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC), varve::system_calls::kernel());
        return fd && holds(fd.get(), step);
    }

    raw_peer peer;
    varve::state s;
    varve::image layout;
    std::vector<varve::block_plan> plans;
    wire::hello hello;
    varve::file_descriptor memory;
    std::byte* pool = nullptr;
    std::size_t pool_bytes = 0;

private:
    std::vector<float> data_;
    std::vector<std::uint8_t> other_;
};

}  // namespace varve_test
