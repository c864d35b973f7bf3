#include "lingering_images.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "varve/detail/text.hpp"

namespace varve::asio::server {

kept_image const* lingering_images::find(std::filesystem::path const& store) const {
    auto const it = by_store_.find(store);
    return it == by_store_.end() ? nullptr : it->second.image.get();
}

lingering_images::timer_ptr lingering_images::keep(std::filesystem::path const& store, std::unique_ptr<kept_image> image,
                                                   boost::asio::io_context& context, std::chrono::milliseconds limit) {
    drop(store);
    auto timer = std::make_shared<boost::asio::steady_timer>(context, limit);
    by_store_.emplace(store, lingering{std::move(image), timer});
    return timer;
}

std::unique_ptr<kept_image> lingering_images::end(std::filesystem::path const& store, timer_ptr const& timer) {
    auto const it = by_store_.find(store);
    if (it == by_store_.end() || it->second.timer != timer) return nullptr;
    auto image = std::move(it->second.image);
    by_store_.erase(it);
    return image;
}

void lingering_images::drop(std::filesystem::path const& store) {
    auto const it = by_store_.find(store);
    if (it == by_store_.end()) return;
    it->second.timer->cancel();
    by_store_.erase(it);
}

void lingering_images::drop_older(std::filesystem::path const& store, std::uint64_t sequence_on_disk) {
    if (auto const* image = find(store); image && image->is_older_than(sequence_on_disk)) drop(store);
}

std::map<std::filesystem::path, std::unique_ptr<kept_image>> lingering_images::clear() {
    std::map<std::filesystem::path, std::unique_ptr<kept_image>> out;
    for (auto& [store, l] : by_store_) {
        l.timer->cancel();
        out.emplace(store, std::move(l.image));
    }
    by_store_.clear();
    return out;
}

void lingering_images::make_room(std::filesystem::path const& store, std::uint64_t bytes) {
    if (budget_.free_bytes() >= bytes) return;
    if (auto const* own = find(store); own && own->durable) drop(store);
    for (auto it = by_store_.begin(); it != by_store_.end() && budget_.free_bytes() < bytes;) {
        auto const& [other, l] = *it++;
        if (l.image->durable) drop(std::filesystem::path(other));
    }
}

void lingering_images::describe(nlohmann::json& out) const {
    for (auto const& [store, l] : by_store_) {
        if (!out.contains("lingering")) out["lingering"] = nlohmann::json::array();
        auto const left = std::chrono::duration<double>(l.timer->expiry() - std::chrono::steady_clock::now()).count();
        out["lingering"].push_back({{"path", varve::detail::printable(store.string())},
                                    {"step", l.image->step},
                                    {"sequence", l.image->sequence},
                                    {"bytes", l.image->size_bytes},
                                    {"durable", l.image->durable},
                                    {"seconds_left", std::max(0.0, left)}});
    }
}

}  // namespace varve::asio::server
