#pragma once

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "files.hpp"
#include "shell.hpp"
#include "support.hpp"

namespace varve_test {

/// A Python that has torch and safetensors (VARVE_TEST_PYTHON); marks the test as skipped where there is none.
inline std::optional<std::string> find_python() {
    char const* path = std::getenv("VARVE_TEST_PYTHON");
    if (!path || !*path) {
        skip("VARVE_TEST_PYTHON names no Python");
        return std::nullopt;
    }
    auto command = "'" + std::string(path) + "' -c 'import torch, safetensors.torch' 2>/dev/null";
    if (shell(command) != 0) {
        skip("the Python of VARVE_TEST_PYTHON has no torch or no safetensors");
        return std::nullopt;
    }
    return path;
}

/// Whether the program ran to its end, in `folder`.
inline bool run_python(std::string const& interpreter, std::filesystem::path const& folder, std::string_view program) {
    write_file(folder / "program.py", program);
    auto command = "cd '" + folder.string() + "' && '" + interpreter + "' program.py";
    return shell(command) == 0;
}

}  // namespace varve_test
