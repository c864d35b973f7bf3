#pragma once

#include <boost/asio/steady_timer.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "varve/asio/transport.hpp"
#include "varve/asio/wire.hpp"

#include "core.hpp"
#include "held_store.hpp"
#include "transport/silence.hpp"

namespace varve::asio::server {

/// One connection to the monitor. Its members are called on its stream's executor, a strand.
class session : public std::enable_shared_from_this<session> {
public:
    session(std::shared_ptr<core> in, std::unique_ptr<stream> connection);

    void start();
    /// Ends the connection with a reason. On any thread.
    void end(error why);

private:
    using clock = std::chrono::steady_clock;

    /// Bytes on their way out, and what goes along with the first.
    struct outgoing {
        std::vector<std::byte> bytes;
        std::vector<file_descriptor> descriptors;
    };
    /// A checkpoint that goes out piece by piece.
    struct sending {
        file_descriptor file;
        memory_budget::lease lease;
        bool in_memory = false;
        std::uint64_t offset = 0, size = 0;
    };

    void read();
    void was_read(std::error_code ec, std::size_t n);
    void take_frames();
    bool take_frame();
    void begin_data(wire::frame_header const& head);
    void read_data();
    void read_payload();
    void expect_in_turn(wire::message type) const;
    void take_message(wire::message type, std::span<std::byte const> payload);

    void take(wire::hello m);
    void take(wire::begin const& m) { trainers().take(m); }
    void take(wire::block_ref const& m) { trainers().take(m); }
    void take(wire::commit m) { trainers().take(std::move(m)); }
    void take(wire::abandon const& m) { trainers().take(m); }
    void take(wire::drain const& m) { trainers().take(m); }
    void take(wire::fetch const& m);
    void answer(std::optional<found_image> found);
    void take(wire::status const& m);
    void take(wire::goodbye const& m);
    void take(wire::pong const&) noexcept {}
    /// What only a monitor sends, or what is not read whole.
    template <class Message>
    void take(Message const&) {}
    held_store& trainers() const;
    void welcome(std::shared_ptr<held_store> const& store, wire::welcome const& w, bool lends);
    void let_go();

    template <class Message>
    void send(Message const& m, std::vector<file_descriptor> descriptors = {});
    void send_next_piece();
    void send_piece(std::vector<std::byte> const& piece);
    void write();
    void cannot_be_heard();

    template <class Call>
    void guarded(Call call) noexcept;
    void fail(error const& why);
    void close();
    void close_in(std::chrono::milliseconds limit);
    void tick();

    std::shared_ptr<core> core_;
    std::unique_ptr<stream> stream_;
    std::string const peer_;
    bool const over_network_;
    boost::asio::steady_timer timer_;
    silence age_, silence_;      ///< since it was accepted, and since something came
    clock::time_point pinged_;   ///< or accepted
    clock::duration period_{0};  ///< of tick

    wire::frame_reader frames_in_{wire::peer::trainer};
    wire::frame_writer frames_out_;
    std::vector<std::byte> buffer_;  ///< read and not taken: [begin_, end_)
    std::size_t begin_ = 0, end_ = 0;
    std::optional<wire::frame_header> head_;  ///< of the frame whose payload is being read
    std::vector<std::byte> payload_;
    memory_budget::lease hello_memory_;
    std::optional<held_store::place> place_;  ///< where the payload goes, where it is a block
    std::size_t placed_ = 0;
    bool reading_ = false;

    std::deque<outgoing> out_;
    std::size_t out_bytes_ = 0;
    bool writing_ = false;
    bool deaf_ = false;  ///< the peer takes nothing any more; it is read to its end
    std::shared_ptr<sending> sending_;
    bool looking_ = false;  ///< for what FETCH asked for, or for its next piece

    enum class state { greeting, attaching, serving, ending, closed } state_ = state::greeting;
    wire::purpose purpose_ = wire::purpose::trainer;
    std::string store_name_;
    bool relayed_ = false;
    std::shared_ptr<held_store> store_;
    bool farewell_ = false;
    bool reads_pool_ = false;  ///< blocks of the trainer's pool, until the store has ended
};

}  // namespace varve::asio::server
