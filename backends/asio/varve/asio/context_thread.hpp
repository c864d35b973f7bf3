#pragma once

#include <thread>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>

#include "varve/detail/thread_name.hpp"

namespace varve::asio {

/// An io_context and the one thread that runs it, until what was started on it is done.
class context_thread {
public:
    /// Throws std::system_error when the thread cannot be started.
    context_thread()
        : work_(context_.get_executor()), thread_([this] {
              varve::detail::name_this_thread("varve-asio");
              context_.run();
          }) {}
    context_thread(context_thread const&) = delete;
    context_thread& operator=(context_thread const&) = delete;
    ~context_thread() {
        work_.reset();
        thread_.join();
    }

    boost::asio::io_context& get() noexcept { return context_; }

private:
    boost::asio::io_context context_{1};
    boost::asio::executor_work_guard<boost::asio::io_context::executor_type> work_;
    std::thread thread_;
};

}  // namespace varve::asio
