#pragma once

#include <cuda_runtime_api.h>

#include <cctype>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>

#include "varve/cuda/error.hpp"

namespace varve::cuda {

/// The calling thread works on device `index` as long as this lives; a negative one stands for the one that it is on.
class device_scope {
public:
    explicit device_scope(int index) noexcept {
        if (index < 0 || code_of(::cudaGetDevice(&before_)) || before_ == index) return;
        changed_ = !code_of(::cudaSetDevice(index));
    }
    ~device_scope() {
        if (changed_) ::cudaSetDevice(before_);
    }
    device_scope(device_scope const&) = delete;
    device_scope& operator=(device_scope const&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

/// The NUMA node that is nearest to the device, as the kernel says; -1 where it does not.
inline int numa_node_of(int device) {
    char address[32] = {};
    if (code_of(::cudaDeviceGetPCIBusId(address, sizeof address, device))) return -1;
    std::string path = "/sys/bus/pci/devices/";
    for (char const* c = address; *c != 0; ++c) path += static_cast<char>(std::tolower(static_cast<unsigned char>(*c)));
    std::ifstream file(path + "/numa_node");
    int node = -1;
    return file >> node ? node : -1;
}

/// What the calling thread does as long as this lives does not end a stream capture that another thread has under way.
/// Source: CUDA Runtime API, cudaThreadExchangeStreamCaptureMode.
class relaxed_capture {
public:
    relaxed_capture() noexcept { ::cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~relaxed_capture() { ::cudaThreadExchangeStreamCaptureMode(&mode_); }
    relaxed_capture(relaxed_capture const&) = delete;
    relaxed_capture& operator=(relaxed_capture const&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Whether work in the stream runs now, or is being recorded into a graph: errc::unsupported then.
inline std::error_code refuse_capture(cudaStream_t stream) noexcept {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (auto ec = code_of(::cudaStreamIsCapturing(stream, &status)))
        return ec == std::error_code(cudaErrorStreamCaptureImplicit, category()) ? make_error_code(errc::unsupported) : ec;
    return status == cudaStreamCaptureStatusNone ? std::error_code() : make_error_code(errc::unsupported);
}

/// A stream of varve's own, which waits for nothing but what it is told to.
class side_stream {
public:
    /// On the calling thread's device; `low_priority` lets the training's kernels go first. Throws error.
    explicit side_stream(bool low_priority) {
        int least = 0, greatest = 0;
        throw_if(::cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
        throw_if(::cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, low_priority ? least : greatest), "a stream for copies");
    }
    ~side_stream() {
        if (stream_) ::cudaStreamDestroy(stream_);
    }
    side_stream(side_stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
    side_stream& operator=(side_stream&&) = delete;

    cudaStream_t get() const noexcept { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

}  // namespace varve::cuda
