#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <random>
#include <vector>

namespace varve_test {

/// What fuzzers do to an input, of more than `from` + 6 bytes, of which the first `from` stay.
template <class Byte>
void mutate(std::vector<Byte>& input, std::mt19937_64& random, std::size_t from) {
    auto at = [&] { return from + random() % (input.size() - from); };
    auto byte = [&] { return static_cast<Byte>(random()); };
    static constexpr std::uint32_t telling[] = {0,          1,          0x7f, 0x80,     0xff,      0xffff,         0x7fffffff,
                                                0x80000000, 0xffffffff, 24,   1u << 20, 16u << 20, (16u << 20) + 1};
    for (auto n = 1 + random() % 4; n > 0 && input.size() > from + 6; --n) {
        switch (random() % 7) {
        case 0: input[at()] ^= static_cast<Byte>(1u << random() % 8); break;
        case 1: input[at()] = byte(); break;
        case 2: input.resize(at()); break;
        case 3: input.insert(input.begin() + static_cast<std::ptrdiff_t>(at()), byte()); break;
        case 4: {
            auto const start = at(), size = std::min<std::size_t>(1 + random() % 64, input.size() - start);
            std::vector<Byte> const piece(input.begin() + static_cast<std::ptrdiff_t>(start),
                                          input.begin() + static_cast<std::ptrdiff_t>(start + size));
            input.insert(input.begin() + static_cast<std::ptrdiff_t>(at()), piece.begin(), piece.end());
            break;
        }
        case 5: input.erase(input.begin() + static_cast<std::ptrdiff_t>(at())); break;
        default: {
            auto const value = telling[random() % std::size(telling)];
            auto const place = std::min(at(), input.size() - 4);
            for (unsigned i = 0; i < 4; ++i) input[place + i] = static_cast<Byte>(value >> 8 * i);
        }
        }
    }
}

}  // namespace varve_test
