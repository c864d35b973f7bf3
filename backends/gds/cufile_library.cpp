#include <cuda_runtime_api.h>
#include <cufile.h>
#include <dlfcn.h>

#include <strings.h>
#include <unistd.h>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <string>
#include <type_traits>

#include "varve/cuda/device.hpp"
#include "varve/cuda/memory.hpp"
#include "varve/gds/cufile.hpp"
#include "varve/gds/error.hpp"

namespace varve::gds {

char const* detail::message_of(int value) noexcept {
    if (value == no_library) return "libcufile.so.0 cannot be loaded; install GPUDirect Storage (a part of the CUDA toolkit, or pip's nvidia-cufile)";
    return ::cufileop_status_error(static_cast<CUfileOpError>(value));
}

namespace {

/// cuFile's functions. The library is loaded when it is asked for: what was built with this backend also starts where there is none.
struct functions {
    decltype(&::cuFileDriverOpen) driver_open = nullptr;
    decltype(&::cuFileDriverGetProperties) properties = nullptr;
    decltype(&::cuFileHandleRegister) handle_register = nullptr;
    decltype(&::cuFileHandleDeregister) handle_deregister = nullptr;
    decltype(&::cuFileBufRegister) buffer_register = nullptr;
    decltype(&::cuFileBufDeregister) buffer_deregister = nullptr;
    decltype(&::cuFileRead) read = nullptr;
    decltype(&::cuFileWrite) write = nullptr;

    functions() {
        // The one that the process has already, or that the system knows; then the one that this was built with.
        void* library = ::dlopen("libcufile.so.0", RTLD_NOW | RTLD_LOCAL);
        if (!library) library = ::dlopen(VARVE_CUFILE_LIBRARY, RTLD_NOW | RTLD_LOCAL);
        bool complete = library != nullptr;
        auto find = [&](auto& function, char const* name) {
            if (complete) function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
            complete = complete && function;
        };
        find(driver_open, "cuFileDriverOpen");
        find(properties, "cuFileDriverGetProperties");
        find(handle_register, "cuFileHandleRegister");
        find(handle_deregister, "cuFileHandleDeregister");
        find(buffer_register, "cuFileBufRegister");
        find(buffer_deregister, "cuFileBufDeregister");
        find(read, "cuFileRead");
        find(write, "cuFileWrite");
        if (!complete) throw error(code_of(detail::no_library));
    }
};

int failure_of(CUfileError_t e) noexcept { return e.err == CU_FILE_SUCCESS ? 0 : static_cast<int>(e.err); }

int failure_of(cudaError_t result) noexcept {
    if (result == cudaSuccess) return 0;
    ::cudaGetLastError();
    return detail::first_of_cuda + static_cast<int>(result);
}

std::int64_t transferred(ssize_t n) noexcept {
    if (n >= 0) return n;
    if (n == -1) return errno > 0 ? -errno : -EIO;
    return n;  // a negative CUfileOpError
}

detail::path_facts facts_of(functions const& call) {
    detail::path_facts facts;
    std::ifstream version("/proc/driver/nvidia-fs/version");
    // "version: 2.25.7"
    for (std::string word; version >> word;) facts.nvidia_fs = word;
    facts.device_node = ::access("/dev/nvidia-fs0", F_OK) == 0;
    auto const* forced = std::getenv("CUFILE_FORCE_COMPAT_MODE");
    facts.forced_compat = forced && (::strcasecmp(forced, "true") == 0 || std::string(forced) == "1");
    CUfileDrvProps_t properties{};
    constexpr unsigned p2p_supported = 1u << 4;  // CU_FILE_P2P_SUPPORTED, which older headers lack
    if (failure_of(call.properties(&properties)) == 0) facts.pci_p2p = (properties.fflags & p2p_supported) != 0;
    return facts;
}

class library_calls final : public cufile {
public:
    library_calls() {
        cuda::relaxed_capture relaxed;
        cuda::throw_if(::cudaGetDevice(&device_), "the current GPU");
        // This makes the device's context, too, which cuFile works in.
        copies_.emplace(true);
        auto opened = failure_of(call_.driver_open());
        if (opened != 0 && opened != CU_FILE_DRIVER_ALREADY_OPEN)
            throw error(code_of(opened), "cannot open cuFile's driver: " + code_of(opened).message());
        facts_ = facts_of(call_);
    }

    int open_file(int fd, file& out) noexcept override {
        CUfileDescr_t about{};
        about.type = CU_FILE_HANDLE_TYPE_OPAQUE_FD;
        about.handle.fd = fd;
        return failure_of(call_.handle_register(&out, &about));
    }
    void close_file(file f) noexcept override { call_.handle_deregister(f); }

    bool in_device_memory(void const* data) const noexcept override {
        cudaPointerAttributes about{};
        return failure_of(::cudaPointerGetAttributes(&about, data)) == 0 && about.type == cudaMemoryTypeDevice;
    }
    int add_memory(std::span<std::byte> region) noexcept override {
        cuda::relaxed_capture relaxed;
        return failure_of(call_.buffer_register(region.data(), region.size(), 0));
    }
    void remove_memory(std::byte* base) noexcept override {
        cuda::relaxed_capture relaxed;
        call_.buffer_deregister(base);
    }

    std::int64_t write(file f, std::byte const* base, std::size_t at, std::size_t size, std::uint64_t file_offset) noexcept override {
        return transferred(call_.write(f, base, size, static_cast<off_t>(file_offset), static_cast<off_t>(at)));
    }
    std::int64_t read(file f, std::byte* base, std::size_t at, std::size_t size, std::uint64_t file_offset) noexcept override {
        return transferred(call_.read(f, base, size, static_cast<off_t>(file_offset), static_cast<off_t>(at)));
    }

    std::shared_ptr<std::byte> host_memory(std::size_t size) override {
        auto memory = std::make_shared<cuda::page_locked>(size);
        return {memory, memory->data()};
    }
    int copy(std::byte* to, std::byte const* from, std::size_t size) noexcept override {
        // A stream of its own: the default one would wait for the training.
        if (auto failed = failure_of(::cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, copies_->get()))) return failed;
        return failure_of(::cudaStreamSynchronize(copies_->get()));
    }
    void enter_thread() noexcept override {
        ::cudaSetDevice(device_);
        // For as long as the thread lives: nothing that it or cuFile does here ends somebody's capture of a stream.
        auto mode = cudaStreamCaptureModeRelaxed;
        ::cudaThreadExchangeStreamCaptureMode(&mode);
    }

    std::string describe() const override { return "cuFile, " + detail::path_text(facts_); }

private:
    functions call_;
    int device_ = 0;
    std::optional<cuda::side_stream> copies_;
    detail::path_facts facts_;
};

}  // namespace

std::shared_ptr<cufile> cufile::library() { return std::make_shared<library_calls>(); }

}  // namespace varve::gds
