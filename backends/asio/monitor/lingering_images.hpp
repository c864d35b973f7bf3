#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>

#include "kept_image.hpp"
#include "memory_budget.hpp"

namespace varve::asio::server {

/// The last checkpoints of trainers that have gone, in memory for their next ones: one a store, each until its time is over. Those
/// that are on disk too give way to whoever needs the memory. Not thread-safe.
class lingering_images {
public:
    using timer_ptr = std::shared_ptr<boost::asio::steady_timer>;

    /// The budget is that which the images' leases are of, and outlives this.
    explicit lingering_images(memory_budget& budget) noexcept : budget_(budget) {}

    bool empty() const noexcept { return by_store_.empty(); }
    /// Null where none lingers.
    kept_image const* find(std::filesystem::path const& store) const;

    /// In place of one that lingers there already. It ends with a call to end() by whoever waits for the timer, which runs.
    timer_ptr keep(std::filesystem::path const& store, std::unique_ptr<kept_image> image, boost::asio::io_context& context,
                   std::chrono::milliseconds limit);
    /// What lingered there; null where that is no longer this timer's image.
    std::unique_ptr<kept_image> end(std::filesystem::path const& store, timer_ptr const& timer);
    void drop(std::filesystem::path const& store);
    /// Where the disk has a later one, of that sequence.
    void drop_older(std::filesystem::path const& store, std::uint64_t sequence_on_disk);
    /// Returns all that lingered.
    std::map<std::filesystem::path, std::unique_ptr<kept_image>> clear();

    /// Drops what is on disk too until that much of the budget is free, or nothing is left to drop; that store's first.
    void make_room(std::filesystem::path const& store, std::uint64_t bytes);

    /// Adds `lingering`, a list, where there are any.
    void describe(nlohmann::json& out) const;

private:
    struct lingering {
        std::unique_ptr<kept_image> image;
        timer_ptr timer;
    };

    memory_budget& budget_;
    std::map<std::filesystem::path, lingering> by_store_;
};

}  // namespace varve::asio::server
