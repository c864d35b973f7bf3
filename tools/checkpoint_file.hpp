#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/text.hpp"
#include "varve/state.hpp"
#include "varve/system.hpp"

namespace varve::tool {

/// A tensor in a checkpoint file of any format.
struct file_tensor {
    std::string name;
    varve::dtype type = varve::dtype::F32;
    std::vector<std::int64_t> shape;
    std::uint64_t size_bytes = 0;
    std::uint64_t offset_bytes = 0;  ///< of its bytes in the file
    std::size_t header_index = 0;    ///< its place in the file's own list
};

/// A checkpoint file of any format, open; its structure is known to be whole. Tensors stand in the order of their bytes.
class checkpoint_file {
public:
    virtual ~checkpoint_file() = default;

    /// The open file, to verify just the bytes that read() gives.
    virtual int fd() const noexcept = 0;
    virtual std::string_view format_name() const noexcept = 0;
    virtual std::uint64_t file_bytes() const noexcept = 0;
    virtual std::vector<file_tensor> const& tensors() const noexcept = 0;
    virtual metadata_map const& metadata() const noexcept = 0;
    /// Reads bytes of one tensor, from `offset_bytes` of its row-major form. Throws varve::error.
    virtual void read(file_tensor const& t, std::uint64_t offset_bytes, std::span<std::byte> to) const = 0;
};

/// Opens a regular file to read; throws varve::error.
file_descriptor open_to_read(std::filesystem::path const& path);

/// The format of an open file, by its content. Throws errc::unsupported for a torch archive where LibTorch is missing.
std::unique_ptr<file_format> format_of(int fd);

/// Opens a file of either format; throws varve::error, its line beginning with the path.
std::unique_ptr<checkpoint_file> open_checkpoint(std::filesystem::path const& path);

/// Calls `call`; an error's line gets the path before it.
template <class Call>
auto at_path(std::filesystem::path const& path, Call call) {
    try {
        return call();
    } catch (varve::error const& e) {
        throw varve::error(e.code(), varve::detail::printable(path.string()) + ": " + e.what());
    }
}

/// How many threads read and hash: the cores that this process may use.
unsigned reading_workers();

/// What stands in a safetensors file under `varve.aliases`: other name -> stored name. Throws errc::malformed.
std::map<std::string, std::string> aliases_of(metadata_map const& metadata);

}  // namespace varve::tool
