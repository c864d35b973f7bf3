#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <system_error>

#include "files.hpp"
#include "varve/error.hpp"
#include "varve/format/safetensors.hpp"

namespace varve_test {

/// All dtypes, an empty tensor, scalars, and sizes that are no multiple of 8; a bit more than two granules.
inline owned_state example(std::uint32_t seed = 1) {
    owned_state s;
    s.add("embedding", "model.embedding.weight", varve::dtype::F32, {1100, 1024}, seed);
    s.add("embedding", "optimizer.embedding.weight.step", varve::dtype::I64, {}, seed + 1);
    s.add("embedding", "optimizer.embedding.weight.exp_avg", varve::dtype::F32, {1100, 1024}, seed + 2);
    s.add("linear", "model.linear.bias", varve::dtype::F32, {3}, seed + 3);
    s.add("linear", "model.linear.half", varve::dtype::BF16, {16}, seed + 4);
    s.add("linear", "model.linear.weight", varve::dtype::F64, {3, 5}, seed + 5);
    s.add("linear", "model.linear.empty", varve::dtype::F32, {0, 7}, seed);
    s.add("run", "rng.cpu", varve::dtype::U8, {5056}, seed + 6);
    s.add("run", "user.odd", varve::dtype::U8, {13}, seed + 7);
    s.add("run", "user.näme \"quoted\"\\\n", varve::dtype::BOOL, {}, seed + 8);
    for (std::size_t i = 0; i < varve::dtype_count; ++i) {
        auto type = static_cast<varve::dtype>(i);
        s.add("run", "user." + std::string(name(type)), type, {2, 3}, seed + 9);
    }
    return s;
}

inline std::error_code code_of(std::function<void()> const& call) {
    try {
        call();
    } catch (varve::error const& e) {
        return e.code();
    }
    return {};
}

inline std::string line_of(std::function<void()> const& call) {
    try {
        call();
    } catch (varve::error const& e) {
        return e.what();
    }
    return "";
}

struct files {
    temporary_folder folder;
    varve::file_descriptor open(std::string_view bytes) {
        write_file(folder.path() / "f", bytes);
        return open_file(folder.path() / "f");
    }
};

}  // namespace varve_test
