#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "varve/error.hpp"

#include "checkpoint_file.hpp"

namespace varve::tool {

/// A checkpoint of a store as a reader finds it, by its header alone.
struct listed_checkpoint {
    std::filesystem::path path;
    std::uint64_t step = 0;
    std::uint64_t sequence = 0;
    std::uint64_t size_bytes = 0;
};

struct listed_store {
    std::vector<listed_checkpoint> checkpoints;  ///< newest first, by sequence
    struct broken_file {
        std::filesystem::path path;
        std::string why;
        bool was_read = true;  ///< false: it may be whole, but could not be looked at
    };
    std::vector<broken_file> broken;  ///< those that carry a checkpoint's name and are none
};

/// Lists the checkpoints of the store in `folder`, without a lock: a file that a writer lets go meanwhile is left out,
/// partial files are ignored. Throws errc::not_a_store for a folder that has neither a mark nor a checkpoint.
listed_store list_store(std::filesystem::path const& folder);

/// Names of all files in the folder that are called as checkpoints are, by step. Throws as list_store does.
std::vector<std::filesystem::path> checkpoint_paths(std::filesystem::path const& folder);

/// Throws for the first of the broken files that could not be looked at, since it may be the newest checkpoint; `step`: of that step alone.
void expect_all_read(listed_store const& listed, std::optional<std::uint64_t> step = {});

/// Whether opening a listed checkpoint failed because a writer has let it go since: then a newer one is there.
bool was_let_go(error const& why, std::filesystem::path const& path);

/// `path` itself if it is a file; in a store its newest checkpoint, of those that were not let go meanwhile. Throws
/// errc::no_checkpoint where there is none.
std::unique_ptr<checkpoint_file> open_newest(std::filesystem::path const& path);

}  // namespace varve::tool
