#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>

namespace varve::detail {

/// Bytes at an address that direct I/O takes.
class aligned_bytes {
public:
    static constexpr std::size_t alignment = 4096;

    explicit aligned_bytes(std::size_t size) : memory_(static_cast<std::byte*>(::operator new(size, std::align_val_t{alignment}))), size_(size) {}
    explicit aligned_bytes(std::span<std::byte const> content) : aligned_bytes(content.size()) {
        std::memcpy(memory_.get(), content.data(), content.size());
    }

    std::byte* data() const noexcept { return memory_.get(); }
    std::size_t size() const noexcept { return size_; }
    std::span<std::byte> bytes() const noexcept { return {memory_.get(), size_}; }

private:
    struct release {
        void operator()(std::byte* p) const noexcept { ::operator delete(p, std::align_val_t{alignment}); }
    };
    std::unique_ptr<std::byte, release> memory_;
    std::size_t size_;
};

}  // namespace varve::detail
