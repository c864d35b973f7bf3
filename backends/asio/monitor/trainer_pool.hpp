#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "varve/asio/monitor/monitor.hpp"
#include "varve/system.hpp"

#include "file_writer.hpp"
#include "shared_region.hpp"

namespace varve::asio::server {

/// A trainer's pool as its monitor has it: regions of host memory, mapped here, or of a GPU's memory, which are read a block at a
/// time into places of the monitor's own. Move-only.
class trainer_pool {
public:
    /// How many blocks of a GPU's pool are on their way to the disk at once, each in a place of its own.
    static constexpr std::size_t places = 4;

    /// None: blocks come as payload.
    trainer_pool() = default;
    explicit trainer_pool(std::vector<shared_region> mapped) : mapped_(std::move(mapped)) {
        for (auto const& r : mapped_) sizes_.push_back(r.bytes().size());
    }
    /// Of a GPU. `reader` makes what reads a region; see monitor_options::device_memory.
    template <class MakeReader>
    trainer_pool(std::vector<file_descriptor> regions, std::vector<std::uint64_t> sizes, std::size_t block_bytes, std::string device,
                 MakeReader reader)
        : sizes_(std::move(sizes)), block_bytes_(block_bytes) {
        open_ = [regions = std::make_shared<std::vector<file_descriptor>>(std::move(regions)), device = std::move(device),
                 reader = std::move(reader)](std::size_t i, std::uint64_t size) { return reader(std::move((*regions)[i]), size, device); };
    }

    bool empty() const noexcept { return sizes_.empty(); }
    bool on_device() const noexcept { return static_cast<bool>(open_); }
    std::size_t count() const noexcept { return sizes_.size(); }
    std::uint64_t size_bytes(std::size_t region) const noexcept { return sizes_[region]; }

    /// Once, before what follows, on the thread that will read: a GPU takes most of a second to begin with. Throws error.
    void open(file_writer& writer) {
        for (std::size_t i = 0; on_device() && i < sizes_.size(); ++i) readers_.push_back(open_(i, sizes_[i]));
        for (auto const& r : mapped_) slots_.push_back(writer.register_memory(r.bytes()));
        if (!on_device()) return;
        memory_ = readers_.front()->host_memory(places * block_bytes_);
        slots_.assign(sizes_.size(), writer.register_memory({memory_.get(), places * block_bytes_}));
        for (std::size_t i = 0; i < places; ++i) free_.push_back(memory_.get() + i * block_bytes_);
    }

    /// As the writer knows where address() and place_for() are.
    int slot(std::size_t region) const noexcept { return slots_[region]; }
    /// Of host memory.
    std::byte* address(std::size_t region, std::uint64_t offset_bytes) const noexcept { return mapped_[region].bytes().data() + offset_bytes; }

    // ---- of a GPU ----

    bool has_place() const noexcept { return !free_.empty(); }
    std::byte* take_place() noexcept {
        auto* const place = free_.back();
        free_.pop_back();
        return place;
    }
    void put_place(std::byte* place) noexcept { free_.push_back(place); }
    /// The reading thread's.
    std::error_code read(std::size_t region, std::uint64_t offset_bytes, std::span<std::byte> to) noexcept {
        return readers_[region]->read(offset_bytes, to);
    }

private:
    std::vector<shared_region> mapped_;
    std::vector<std::uint64_t> sizes_;
    std::vector<int> slots_;
    std::size_t block_bytes_ = 0;
    std::function<std::unique_ptr<device_reader>(std::size_t region, std::uint64_t size_bytes)> open_;
    std::vector<std::unique_ptr<device_reader>> readers_;
    std::shared_ptr<std::byte> memory_;  ///< the places
    std::vector<std::byte*> free_;
};

}  // namespace varve::asio::server
