#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <functional>
#include <future>
#include <utility>

#include "comes_to.hpp"
#include "device_model.hpp"

namespace varve_test {

/// A stream whose work comes late where a test says so: whoever is not ordered by it sees the state before.
class late_stream {
public:
    explicit late_stream(cudaStream_t stream) : stream_(stream) {}
    ~late_stream() {
        door_.open();
        ::cudaStreamSynchronize(stream_);
    }
    late_stream(late_stream const&) = delete;
    late_stream& operator=(late_stream const&) = delete;

    /// The GPU does not get to what is enqueued from now on within the next milliseconds. The future's end waits for them.
    std::future<void> hold() {
        return hold_until(
            [until = std::chrono::steady_clock::now() + std::chrono::milliseconds(10)] { return std::chrono::steady_clock::now() >= until; });
    }
    /// The same until that is so, or for some seconds: a call that waits for the device is to end all the same.
    std::future<void> hold_until(std::function<bool()> over) {
        door_.close();
        varve_test::hold(stream_, door_);
        return std::async(std::launch::async, [this, over = std::move(over)] {
            comes_to(over, std::chrono::seconds(5), std::chrono::milliseconds(1));
            door_.open();
        });
    }

private:
    cudaStream_t stream_;
    gate door_;
};

}  // namespace varve_test
