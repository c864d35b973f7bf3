#include "varve/asio/monitor/monitor.hpp"

#include <boost/asio/post.hpp>

#include "core.hpp"

namespace varve::asio {

class monitor::impl {
public:
    explicit impl(monitor_options options) : core(std::make_shared<server::core>(std::move(options))) { core->listen(); }

    std::shared_ptr<server::core> core;
};

monitor::monitor(monitor_options options) : impl_(std::make_shared<impl>(std::move(options))) {}
monitor::~monitor() {
    stop();
    // What is under way ends as with run().
    run();
}

void monitor::run() { impl_->core->run(); }
void monitor::stop() noexcept {
    // What is posted once run() has returned stays where it is, in a context that the core itself owns.
    boost::asio::post(impl_->core->context(), [core = std::weak_ptr(impl_->core)] {
        if (auto const in = core.lock()) in->stop();
    });
}
std::vector<address> monitor::where() const { return impl_->core->where(); }
std::string monitor::status() const { return impl_->core->status(); }

}  // namespace varve::asio
