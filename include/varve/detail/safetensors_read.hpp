#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "varve/detail/safetensors_outline.hpp"
#include "varve/state.hpp"

namespace varve::detail {

/// A tensor in a file; offsets count from the start of the data.
struct safetensors_entry {
    std::string name;
    varve::dtype type = varve::dtype::F32;
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    std::size_t header_index = 0;  ///< its place among the header's entries: varve's stand in the order of the state
};

/// A safetensors file's header, of whoever wrote it. Tensors stand in the order of their bytes.
struct safetensors_file {
    safetensors_outline outline;
    std::vector<safetensors_entry> tensors;
    metadata_map metadata;  ///< all of it, varve's own too

    std::uint64_t data_offset() const noexcept { return outline.extent.data_offset; }
    std::uint64_t file_bytes() const noexcept { return outline.extent.file_bytes; }
};

/// Reads the header once its structure is known to be whole; throws errc::malformed.
inline safetensors_file read_safetensors(int fd) {
    safetensors_file out;
    out.outline = read_outline(fd);
    struct {
        safetensors_file& file;
        void tensor(header_entry const& e) {
            if (e.end > file.outline.extent.data_bytes()) refuse_file("it changed while it was read");
            file.tensors.push_back({std::string(e.name), e.type, {e.shape.begin(), e.shape.end()}, e.begin, e.end, file.tensors.size()});
        }
        void metadata(std::string const& key, std::string const& value, std::uint64_t) { file.metadata.emplace(key, value); }
    } visitor{out};
    visit_header(fd, out.outline.extent, visitor);
    std::stable_sort(out.tensors.begin(), out.tensors.end(),
                     [](auto const& a, auto const& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
    return out;
}

}  // namespace varve::detail
