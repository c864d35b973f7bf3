#include "core.hpp"

#include <unistd.h>
#include <nlohmann/json.hpp>

#include "varve/detail/text.hpp"
#include "varve/version.hpp"

namespace varve::asio::server {

std::string core::status() const {
    nlohmann::json out;
    out["version"] = VARVE_VERSION;
    out["pid"] = ::getpid();
    out["dir"] = varve::detail::printable(options_.dir.string());
    for (auto const& at : where_) out["listen"].push_back(varve::detail::printable(at.text()));
    out["memory_limit_bytes"] = budget_.limit_bytes();
    out["memory_used_bytes"] = budget_.used_bytes() + greetings_.used_bytes();
    out["stores"] = nlohmann::json::array();
    std::lock_guard lock(mutex_);
    out["connections"] = sessions_.size();
    for (auto const& [path, store] : stores_) {
        nlohmann::json one{{"path", varve::detail::printable(path.string())}, {"trainer", store->has_trainer()}};
        store->describe(one);
        out["stores"].push_back(std::move(one));
    }
    if (options_.peer) {
        auto& peer = out["peer"];
        peer["address"] = varve::detail::printable(options_.peer->text());
        peer["tls"] = options_.peer_tls != nullptr;
        peer["stores"] = nlohmann::json::array();
        for (auto const& [path, copy] : replicas_) copy->describe(peer["stores"].emplace_back());
    }
    lingering_.describe(out);
    return out.dump();
}

}  // namespace varve::asio::server
