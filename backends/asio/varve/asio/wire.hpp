#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "varve/asio/detail/wire_fields.hpp"
#include "varve/checkpointer_options.hpp"
#include "varve/image.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"

/// What a trainer and a monitor say to each other: messages, each in a frame of its own. No sockets here.
///
/// A frame is 24 bytes and its payload. Integers are little-endian: u32 magic, u16 type, u16 zero, u32 payload_bytes, u32
/// zero, u64 number. Numbers count from 0 in each direction; any other ends the connection, as does everything else that
/// is not as it is written here. Encoding appends to a vector; decoding throws error(errc::malformed) with one line.
namespace varve::asio::wire {

inline constexpr std::uint32_t magic = 0x31565256;  ///< "VRV1"
inline constexpr std::uint32_t version = 3;
inline constexpr std::size_t header_bytes = 24;
inline constexpr std::size_t most_control_bytes = 16u << 20;
inline constexpr std::size_t most_hello_bytes = 128u << 20;
inline constexpr std::size_t most_data_bytes = 64u << 20;                       ///< of a block or piece that travels as payload
inline constexpr std::uint64_t most_checkpoint_bytes = std::uint64_t{1} << 42;  ///< of its tensors
/// A digest for each chunk of the largest; a monitor takes no more than the run's checkpoints have.
inline constexpr std::size_t most_commit_bytes = most_control_bytes + most_checkpoint_bytes / digest_chunk_bytes * sizeof(std::uint64_t);
inline constexpr std::uint64_t most_region_bytes = std::uint64_t{1} << 30;
inline constexpr std::chrono::milliseconds longest_interval = std::chrono::hours(24 * 365);  ///< of durable saves

enum class message : std::uint16_t {
    // from the trainer
    hello = 1,
    begin,
    block_ref,
    block_data,
    commit,
    abandon,
    fetch,
    status,
    goodbye,
    pong,
    drain,
    // from the monitor
    welcome = 64,
    credit,
    release,
    crash_safe,
    durable,
    failed,
    image,
    image_data,
    status_reply,
    refusal,
    ping
};

/// Who sends.
enum class peer : std::uint8_t { trainer, monitor };
/// What a connection is for.
enum class purpose : std::uint8_t { trainer, status, fetch };

// ---- from the trainer ----

/// The first message, once. For purposes other than `trainer` only `store` and `relayed` count. On a Unix socket as many descriptors come
/// with its first byte as `region_bytes` has sizes: the regions of the staging pool, which blocks are then named by.
struct hello {
    static constexpr auto type = message::hello;
    std::uint32_t version = wire::version;
    wire::purpose purpose = wire::purpose::trainer;
    std::string store;          ///< a path; over TCP a name
    std::string made_by;        ///< for the mark of a new store
    std::string extension;      ///< the format's
    std::vector<layer> layers;  ///< their addresses are left out
    std::map<std::string, std::string> aliases;
    std::uint64_t image_bytes = 0;
    std::uint64_t header_bytes = 0;
    std::uint64_t block_bytes = 0;  ///< of the staging, or the most that one BLOCK_DATA brings
    std::uint32_t in_flight = 1;
    when_busy busy = when_busy::block;
    std::uint64_t keep = 2;
    std::uint64_t keep_every = 0;
    prepare_mode prepare = prepare_mode::write;
    bool fresh = false;
    bool overwrite = false;
    bool wait_until_prepared = false;  ///< WELCOME comes once every slot was written
    std::vector<std::uint64_t> region_bytes;
    bool relayed = false;                   ///< from a monitor whose peer this one is: what it brings or asks for goes no further
    std::uint64_t durable_interval_ms = 0;  ///< from the begin of a save's write to that of the next; for when_busy::replace
    std::string device;                     ///< whose memory the regions are: a GPU, by its UUID in 32 hexadecimal digits; empty: the host's (memfd)

    static void fields(auto& m, auto& io) {
        io(m.version);
        if (m.version != wire::version) return io.skip_rest();  // laid out in another way: its version is all that it says
        io.choice(m.purpose, 2);
        io(m.store, m.made_by, m.extension, m.layers, m.aliases, m.image_bytes, m.header_bytes, m.block_bytes, m.in_flight);
        io.choice(m.busy, 2);
        io(m.keep, m.keep_every);
        io.choice(m.prepare, 2);
        io(m.fresh, m.overwrite, m.wait_until_prepared, m.region_bytes, m.relayed, m.durable_interval_ms, m.device);
    }
};

/// Save `save`, a number that the trainer gives and never uses again, is of that step.
struct begin {
    static constexpr auto type = message::begin;
    std::uint64_t save = 0, step = 0;
    static void fields(auto& m, auto& io) { io(m.save, m.step); }
};

/// Bytes [image_offset, image_offset + size) stand in a region of the pool; they are the monitor's until RELEASE.
struct block_ref {
    static constexpr auto type = message::block_ref;
    std::uint64_t save = 0, image_offset = 0;
    std::uint32_t size = 0, region = 0;
    std::uint64_t region_offset = 0;
    static void fields(auto& m, auto& io) { io(m.save, m.image_offset, m.size, m.region, m.region_offset); }
};

/// The same bytes as payload; they use up credit.
struct block_data {
    static constexpr auto type = message::block_data;
    std::uint64_t save = 0, image_offset = 0;
    std::span<std::byte const> bytes;  ///< of the frame that was decoded
    static void fields(auto& m, auto& io) {
        io(m.save, m.image_offset);
        io.rest(m.bytes);
    }
};

/// Everything but the header was sent. By reference the monitor hashes, and there are no digests here.
struct commit {
    static constexpr auto type = message::commit;
    std::uint64_t save = 0;
    metadata_map metadata;
    std::vector<std::uint64_t> chunk_digests;
    static void fields(auto& m, auto& io) { io(m.save, m.metadata, m.chunk_digests); }
};

/// The save is not wanted any more; the monitor answers with FAILED once it has let go of its blocks.
struct abandon {
    static constexpr auto type = message::abandon;
    std::uint64_t save = 0;
    static void fields(auto& m, auto& io) { io(m.save); }
};

/// Asks for the newest checkpoint, or that of `step`; `skip` so many newer ones, which turned out to be broken.
struct fetch {
    static constexpr auto type = message::fetch;
    bool has_step = false;
    std::uint64_t step = 0;
    std::uint32_t skip = 0;
    static void fields(auto& m, auto& io) { io(m.has_step, m.step, m.skip); }
};

struct status {
    static constexpr auto type = message::status;
    static void fields(auto&, auto&) {}
};

/// Nothing follows, and nothing is waited for.
struct goodbye {
    static constexpr auto type = message::goodbye;
    static void fields(auto&, auto&) {}
};

struct pong {
    static constexpr auto type = message::pong;
    static void fields(auto&, auto&) {}
};

/// On: the trainer waits for its saves, and none is to be held back; off: it waits no longer.
struct drain {
    static constexpr auto type = message::drain;
    bool on = false;
    static void fields(auto& m, auto& io) { io(m.on); }
};

// ---- from the monitor ----

/// The answer to HELLO, once nothing of an earlier connection of this store reads its pool any more: what was on loan to
/// that one is the trainer's again. Steps are 0 where there is none.
struct welcome {
    static constexpr auto type = message::welcome;
    std::uint32_t version = wire::version;
    std::uint64_t durable_step = 0, durable_sequence = 0, memory_step = 0;
    std::uint64_t credit_bytes = 0;  ///< BLOCK_DATA bytes that may be sent before CREDIT comes
    static void fields(auto& m, auto& io) { io(m.version, m.durable_step, m.durable_sequence, m.memory_step, m.credit_bytes); }
};

/// So many bytes of BLOCK_DATA more.
struct credit {
    static constexpr auto type = message::credit;
    std::uint64_t bytes = 0;
    static void fields(auto& m, auto& io) { io(m.bytes); }
};

/// The block that stands there is the trainer's again.
struct release {
    static constexpr auto type = message::release;
    std::uint32_t region = 0;
    std::uint64_t region_offset = 0;
    static void fields(auto& m, auto& io) { io(m.region, m.region_offset); }
};

struct crash_safe {
    static constexpr auto type = message::crash_safe;
    std::uint64_t save = 0;
    static void fields(auto& m, auto& io) { io(m.save); }
};

struct durable {
    static constexpr auto type = message::durable;
    std::uint64_t save = 0, sequence = 0;
    static void fields(auto& m, auto& io) { io(m.save, m.sequence); }
};

/// The save has ended and is not durable; errc::replaced for one that gave way.
struct failed {
    static constexpr auto type = message::failed;
    std::uint64_t save = 0;
    std::error_code code;
    std::string text;
    static void fields(auto& m, auto& io) { io(m.save, m.code, m.text); }
};

/// The answer to FETCH; of no bytes where there is no such checkpoint. On a Unix socket a descriptor comes with its first
/// byte, elsewhere IMAGE_DATA follows until size_bytes are there.
struct image {
    static constexpr auto type = message::image;
    std::uint64_t step = 0, sequence = 0, size_bytes = 0;
    bool in_memory = false;
    std::string name;  ///< where it stands, for people
    static void fields(auto& m, auto& io) { io(m.step, m.sequence, m.size_bytes, m.in_memory, m.name); }
};

/// A piece of the image, in order.
struct image_data {
    static constexpr auto type = message::image_data;
    std::uint64_t offset = 0;
    std::span<std::byte const> bytes;
    static void fields(auto& m, auto& io) {
        io(m.offset);
        io.rest(m.bytes);
    }
};

struct status_reply {
    static constexpr auto type = message::status_reply;
    std::string json;
    static void fields(auto& m, auto& io) { io(m.json); }
};

/// Why the monitor ends the connection; its last message. On the wire and in the README: ERROR.
struct refusal {
    static constexpr auto type = message::refusal;
    std::error_code code;
    std::string text;
    static void fields(auto& m, auto& io) { io(m.code, m.text); }
};

/// Answered by PONG.
struct ping {
    static constexpr auto type = message::ping;
    static void fields(auto&, auto&) {}
};

// ---- frames ----

/// Calls `f` with the std::type_identity of the messages of that type; false if there is none.
template <class F>
constexpr bool with_message(message type, F&& f) {
    auto among = [&]<class... M>() { return ((M::type == type && (f(std::type_identity<M>{}), true)) || ...); };
    return among.template operator()<hello, begin, block_ref, block_data, commit, abandon, fetch, status, goodbye, pong, drain, welcome, credit,
                                     release, crash_safe, durable, failed, image, image_data, status_reply, refusal, ping>();
}

constexpr peer sender_of(message type) noexcept { return type < message::welcome ? peer::trainer : peer::monitor; }

/// The most bytes that a payload of that type may have.
constexpr std::size_t most_payload_bytes(message type) noexcept {
    switch (type) {
    case message::hello: return most_hello_bytes;
    case message::commit: return most_commit_bytes;
    case message::block_data: return most_data_bytes + 16;
    case message::image_data: return most_data_bytes + 8;
    default: return most_control_bytes;
    }
}

/// What a frame says before its payload.
struct frame_header {
    message type = message::hello;
    std::uint32_t payload_bytes = 0;
};

/// Writes frames of one direction, numbered.
class frame_writer {
public:
    /// Appends the message's frame to `out`. Throws std::errc::message_size where the message is larger than a peer takes.
    template <class Message>
    void append(std::vector<std::byte>& out, Message const& m) {
        append_head(out, m, 0);
    }

    /// Appends all but the last `behind` bytes of the payload, which the caller sends behind it from where they are.
    template <class Message>
    void append_head(std::vector<std::byte>& out, Message const& m, std::size_t behind) {
        auto const start = out.size();
        detail::field_writer io(out);
        io(magic, static_cast<std::uint16_t>(Message::type), std::uint16_t{0}, std::uint32_t{0}, std::uint32_t{0}, next_);
        Message::fields(m, io);
        auto const payload = out.size() - start - header_bytes + behind;
        if (payload > most_payload_bytes(Message::type)) {
            out.resize(start);
            throw error(std::make_error_code(std::errc::message_size), "a message of " + std::to_string(payload) + " bytes is too large");
        }
        for (unsigned i = 0; i < 4; ++i) out[start + 8 + i] = static_cast<std::byte>(payload >> 8 * i);
        ++next_;
    }

    /// The number of the frame that comes next.
    std::uint64_t next() const noexcept { return next_; }

private:
    std::uint64_t next_ = 0;
};

/// Gives a frame another number: for who writes frames before their order is known.
inline void set_number(std::span<std::byte> frame, std::uint64_t number) noexcept {
    for (unsigned i = 0; i < 8; ++i) frame[16 + i] = static_cast<std::byte>(number >> 8 * i);
}

/// Checks the headers of frames from one peer. The payload must be read only after the header was accepted.
class frame_reader {
public:
    explicit frame_reader(peer from) noexcept : from_(from) {}

    /// Throws errc::malformed for another protocol, a message that this peer does not send, one that is too large, and one
    /// whose number is not the next.
    frame_header accept(std::span<std::byte const, header_bytes> bytes) {
        detail::field_reader io(bytes);
        std::uint32_t word = 0, payload = 0, zero = 0;
        std::uint16_t type = 0, none = 0;
        std::uint64_t number = 0;
        io(word, type, none, payload, zero, number);
        if (word != magic) detail::refuse_message("it does not begin with VRV1");
        auto const what = static_cast<message>(type);
        if (!with_message(what, [](auto) {}) || sender_of(what) != from_) detail::refuse_message("of type " + std::to_string(type));
        if (none != 0 || zero != 0) detail::refuse_message("what must be zero is not");
        if (number != next_) detail::refuse_message("number " + std::to_string(number) + " where " + std::to_string(next_) + " comes next");
        if (payload > most_payload_bytes(what)) detail::refuse_message(std::to_string(payload) + " bytes, type " + std::to_string(type));
        ++next_;
        return {what, payload};
    }

private:
    peer from_;
    std::uint64_t next_ = 0;
};

/// The message of a whole payload; spans in it point there. Throws errc::malformed where it ends early or late.
template <class Message>
Message decode(std::span<std::byte const> payload) {
    Message m;
    detail::field_reader io(payload);
    Message::fields(m, io);
    io.expect_end();
    return m;
}

/// Decodes and hands the message to `visitor`. Throws as decode does.
template <class Visitor>
void decode(message type, std::span<std::byte const> payload, Visitor&& visitor) {
    with_message(type, [&]<class Message>(std::type_identity<Message>) { visitor(decode<Message>(payload)); });
}

}  // namespace varve::asio::wire
