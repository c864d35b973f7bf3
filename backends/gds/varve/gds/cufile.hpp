#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <system_error>

namespace varve::gds {

/// The one seam through which every call of cuFile goes, and the copies where cuFile has no way, so that a test can record
/// it, fail it or tear it, without a GPU. A failure is 0 for none, or what gds::code_of takes. Thread-safe.
class cufile {
public:
    using file = void*;

    virtual ~cufile() = default;

    /// Tells cuFile of a descriptor, which stays open until close_file.
    virtual int open_file(int fd, file& out) noexcept = 0;
    virtual void close_file(file f) noexcept = 0;

    virtual bool in_device_memory(void const* data) const noexcept = 0;
    /// Tells cuFile of GPU memory, which stays until remove_memory.
    virtual int add_memory(std::span<std::byte> region) noexcept = 0;
    virtual void remove_memory(std::byte* base) noexcept = 0;

    /// From or to `base` plus `at`, GPU memory; `base` is that of a region which was added, where it lies in one. Returns the
    /// bytes that were transferred or, below 0, a negative failure.
    virtual std::int64_t write(file f, std::byte const* base, std::size_t at, std::size_t size, std::uint64_t file_offset) noexcept = 0;
    virtual std::int64_t read(file f, std::byte* base, std::size_t at, std::size_t size, std::uint64_t file_offset) noexcept = 0;

    /// Host memory to copy through, aligned to 4,096 bytes. Throws error.
    virtual std::shared_ptr<std::byte> host_memory(std::size_t size) = 0;
    /// Returns when the bytes are there.
    virtual int copy(std::byte* to, std::byte const* from, std::size_t size) noexcept = 0;
    /// The calling thread, one of the sink's own, is going to transfer.
    virtual void enter_thread() noexcept {}

    /// Which way the bytes go: nvidia-fs or compatibility mode.
    virtual std::string describe() const = 0;

    /// That of libcufile.so.0 for the calling thread's device. Its driver is opened with the first one and stays open until
    /// the process ends, when cuFile closes it. Throws error: with category() where there is no library or it does not start
    /// here, with CUDA's where there is no GPU.
    static std::shared_ptr<cufile> library();
};

namespace detail {

/// What is known about the way that cuFile takes.
struct path_facts {
    std::string nvidia_fs{};     ///< the version of the kernel module; empty where it is not loaded
    bool device_node = false;    ///< and its device can be seen from here
    bool forced_compat = false;  ///< by CUFILE_FORCE_COMPAT_MODE
    bool pci_p2p = false;        ///< the library knows the kernel's own way between PCI devices
};

/// One line, without a version of cuFile.
inline std::string path_text(path_facts const& f) {
    if (f.forced_compat) return "compatibility mode (CUFILE_FORCE_COMPAT_MODE is set)";
    if (!f.nvidia_fs.empty() && f.device_node) return "nvidia-fs " + f.nvidia_fs;
    std::string const why =
        f.nvidia_fs.empty() ? "nvidia-fs is not loaded" : "nvidia-fs " + f.nvidia_fs + " is loaded, but /dev/nvidia-fs0 is not here";
    return "compatibility mode (" + why + (f.pci_p2p ? "; PCI P2PDMA where kernel and disk have it)" : ")");
}

}  // namespace detail
}  // namespace varve::gds
