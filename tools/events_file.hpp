#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "varve/observer.hpp"
#include "varve/system.hpp"

namespace varve::tool {

/// An observer that appends each event to a file: one JSON object a line, one write each, so that several processes may share
/// the file. A kill at the moment at which a line goes from one page of the file to the next may leave its beginning; the next
/// process that opens the file ends that line, so that it spoils no other. Thread-safe.
class events_file {
public:
    /// Throws varve::error if the file cannot be opened for appending.
    events_file(std::filesystem::path const& path, std::string method);

    void on(event const& e) noexcept;
    /// A training step was done.
    void step(std::uint64_t step, float loss) noexcept;

    /// Why events were lost, or nothing.
    std::error_code failure() const noexcept { return {failed_.load(std::memory_order_relaxed), std::system_category()}; }

private:
    void append(std::string_view line) noexcept;

    file_descriptor file_;
    std::string method_;
    std::atomic<int> failed_{0};
};

static_assert(observer<events_file>);

}  // namespace varve::tool
