#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "client/dialogue.hpp"
#include "varve/asio/wire.hpp"
#include "varve/error.hpp"

namespace {

namespace wire = varve::asio::wire;

/// Bytes again, with no memory behind them: to read on is to crash, with any compiler.
class fence {
public:
    fence() {
        auto const page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
        auto* const all = ::mmap(nullptr, most_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) __builtin_trap();
        end_ = static_cast<std::byte*>(all) + most_bytes;
        if (::mprotect(end_, page, PROT_NONE) != 0) __builtin_trap();
    }

    std::span<std::byte const> copy(std::span<std::byte const> bytes) const {
        if (bytes.size() > most_bytes) return bytes;
        auto* const to = end_ - bytes.size();
        std::copy(bytes.begin(), bytes.end(), to);
        return {to, bytes.size()};
    }

private:
    static constexpr std::size_t most_bytes = 1u << 20;
    std::byte* end_;
};

/// Whatever was taken for a message can be sent on, and is then taken for the same.
template <class Message>
void expect_the_same_again(Message const& m) {
    std::vector<std::byte> once, twice;
    wire::frame_writer{}.append(once, m);
    wire::frame_writer{}.append(twice, wire::decode<Message>(std::span(once).subspan(wire::header_bytes)));
    if (once != twice) __builtin_trap();
}

}  // namespace

/// The parser of messages, either end's, and of frames as the sink has it; the monitor's own reading of frames is given mutated
/// conversations by protocol_test.cpp. The first byte says whose bytes follow and how they are cut.
/// With clang: -fsanitize=fuzzer,address; with any compiler: wire_fuzz_test.cpp.
extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
    if (size == 0) return 0;
    varve::asio::client::frame_buffer frames((data[0] & 1) != 0 ? wire::peer::monitor : wire::peer::trainer);
    std::size_t const cut = 1 + (data[0] >> 1);
    static fence const before_nothing;
    auto left = std::as_bytes(std::span(data, size)).subspan(1);
    try {
        while (!left.empty()) {
            auto const room = frames.room();
            auto const n = std::min({room.size(), cut, left.size()});
            if (n == 0) __builtin_trap();
            std::copy_n(left.begin(), n, room.begin());
            frames.filled(n);
            left = left.subspan(n);
            while (auto const next = frames.next())
                wire::decode(next->first, before_nothing.copy(next->second), [](auto const& m) { expect_the_same_again(m); });
        }
    } catch (varve::error const& e) {
        if (e.code() != varve::errc::malformed) __builtin_trap();
    }
    return 0;
}
