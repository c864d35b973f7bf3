#pragma once

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>
#include <system_error>
#include <utility>

#include "varve/error.hpp"

namespace varve::cuda::detail {

/// Memory of which no page is there before it is touched: in huge pages where the kernel gives them, which are there, and are
/// page-locked, in a fraction of the time. It is page-aligned, and stays with this process when it forks.
/// Source: madvise(2); mbind(2), through the system call, since libnuma is not everywhere.
class paged_memory {
public:
    static constexpr std::size_t huge_bytes = 2u << 20;  ///< of a huge page

    paged_memory() noexcept = default;
    /// Of any node. Throws error: std::errc::not_enough_memory.
    explicit paged_memory(std::size_t size_bytes) {
        if (int const code = map(size_bytes)) {
            std::error_code const why(code, std::generic_category());
            throw error(why, "cannot have " + std::to_string(size_bytes) + " bytes of memory: " + why.message());
        }
        advise(size_bytes);
    }
    /// Of one NUMA node and no other. Throws error: std::errc::not_enough_memory, or what the kernel says of the node
    /// (invalid_argument: there is none of that number; function_not_supported or operation_not_permitted: no bindings here).
    paged_memory(std::size_t size_bytes, int node) {
        constexpr std::size_t word_bits = 8 * sizeof(unsigned long);
        std::array<unsigned long, 1024 / word_bits> nodes{};
        if (node < 0 || static_cast<std::size_t>(node) >= nodes.size() * word_bits) refuse(EINVAL, node);
        nodes[static_cast<std::size_t>(node) / word_bits] = 1UL << (static_cast<std::size_t>(node) % word_bits);
        if (int const code = map(size_bytes)) refuse(code, node);
        // The kernel takes the count of bits plus one.
        if (::syscall(SYS_mbind, mapping_, mapped_bytes_, MPOL_BIND, nodes.data(), nodes.size() * word_bits + 1, 0U) != 0) {
            int const code = errno;
            unmap();
            refuse(code, node);
        }
        advise(size_bytes);
    }
    paged_memory(paged_memory&& other) noexcept
        : mapping_(std::exchange(other.mapping_, nullptr)), mapped_bytes_(other.mapped_bytes_), data_(std::exchange(other.data_, nullptr)) {}
    paged_memory& operator=(paged_memory&& other) noexcept {
        std::swap(mapping_, other.mapping_);
        std::swap(mapped_bytes_, other.mapped_bytes_);
        std::swap(data_, other.data_);
        return *this;
    }
    ~paged_memory() { unmap(); }

    std::byte* data() const noexcept { return data_; }

private:
    [[noreturn]] static void refuse(int code, int node) {
        throw error(std::error_code(code, std::generic_category()), "cannot have memory of NUMA node " + std::to_string(node));
    }

    /// Returns 0 or an errno. What is large begins where a huge page does.
    int map(std::size_t size_bytes) noexcept {
        mapped_bytes_ = size_bytes + (size_bytes < huge_bytes ? 0 : huge_bytes);
        auto* const memory = ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return errno;
        mapping_ = data_ = static_cast<std::byte*>(memory);
        if (size_bytes >= huge_bytes) data_ += (huge_bytes - reinterpret_cast<std::uintptr_t>(memory) % huge_bytes) % huge_bytes;
        return 0;
    }
    /// The rest behind the last whole one would take a whole one.
    void advise(std::size_t size_bytes) noexcept {
        ::madvise(data_, size_bytes / huge_bytes * huge_bytes, MADV_HUGEPAGE);
        ::madvise(mapping_, mapped_bytes_, MADV_DONTFORK);
    }
    void unmap() noexcept {
        if (mapping_) ::munmap(mapping_, mapped_bytes_);
        mapping_ = data_ = nullptr;
    }

    std::byte* mapping_ = nullptr;
    std::size_t mapped_bytes_ = 0;
    std::byte* data_ = nullptr;
};

}  // namespace varve::cuda::detail
