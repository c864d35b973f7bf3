#pragma once

#include <filesystem>

namespace varve::tool {

/// Makes the folder, empty, for a store of bench's. One that bench wrote before is emptied; one with anything else in it, and one
/// that another process writes, is refused with varve::error, one line, and left as it was.
void prepare_bench_store(std::filesystem::path const& dir);

/// Deletes a store of bench's. Throws errc::store_locked where another process writes it.
void remove_bench_store(std::filesystem::path const& dir);

/// What train goes on from is train's: bench empties it no more. Does nothing where `dir` is no store of bench's. For who has it open
/// to write.
void take_over_bench_store(std::filesystem::path const& dir);

/// Makes a folder and checks that files can be made in it; throws varve::error that says what `what` is and what to do.
void make_writable_folder(std::filesystem::path const& dir, char const* what);

/// Waits until the file system has written what it buffers, so that one method's pages do not slow the next one down.
void settle_disk(std::filesystem::path const& dir);

}  // namespace varve::tool
