#pragma once

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>
#include <utility>

#include "varve/error.hpp"

namespace varve::cuda::detail {

/// Memory whose pages come from one NUMA node and no other; it is page-aligned, and no page is there before it is touched.
/// Source: mbind(2), through the system call, since libnuma is not everywhere.
class node_memory {
public:
    node_memory() noexcept = default;
    /// Throws error: std::errc::not_enough_memory, or what the kernel says of the node (invalid_argument: there is none of that
    /// number; function_not_supported or operation_not_permitted: no bindings here).
    node_memory(std::size_t size_bytes, int node) : size_bytes_(size_bytes) {
        constexpr std::size_t word_bits = 8 * sizeof(unsigned long);
        std::array<unsigned long, 1024 / word_bits> nodes{};
        if (node < 0 || static_cast<std::size_t>(node) >= nodes.size() * word_bits) refuse(EINVAL, node);
        nodes[static_cast<std::size_t>(node) / word_bits] = 1UL << (static_cast<std::size_t>(node) % word_bits);
        auto* const memory = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) refuse(errno, node);
        data_ = static_cast<std::byte*>(memory);
        // The kernel takes the count of bits plus one.
        if (::syscall(SYS_mbind, data_, size_bytes, MPOL_BIND, nodes.data(), nodes.size() * word_bits + 1, 0U) != 0) {
            int const code = errno;
            ::munmap(std::exchange(data_, nullptr), size_bytes);
            refuse(code, node);
        }
        ::madvise(data_, size_bytes, MADV_HUGEPAGE);
    }
    node_memory(node_memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_bytes_(other.size_bytes_) {}
    node_memory& operator=(node_memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_bytes_, other.size_bytes_);
        return *this;
    }
    ~node_memory() {
        if (data_) ::munmap(data_, size_bytes_);
    }

    std::byte* data() const noexcept { return data_; }

private:
    [[noreturn]] static void refuse(int code, int node) {
        throw error(std::error_code(code, std::generic_category()), "cannot have memory of NUMA node " + std::to_string(node));
    }

    std::byte* data_ = nullptr;
    std::size_t size_bytes_ = 0;
};

}  // namespace varve::cuda::detail
