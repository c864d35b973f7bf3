#pragma once

#include <cstddef>
#include <new>

namespace varve::asio {

/// Room for the one operation that Asio has pending for its owner, so that nothing is allocated for a write. An operation
/// that is larger goes to the heap. One owner at a time.
class handler_memory {
public:
    handler_memory() noexcept = default;
    handler_memory(handler_memory const&) = delete;
    handler_memory& operator=(handler_memory const&) = delete;

    void* take(std::size_t size) {
        if (taken_ || size > sizeof room_) return ::operator new(size);
        taken_ = true;
        return room_;
    }

    void give_back(void* p) noexcept {
        if (p == room_)
            taken_ = false;
        else
            ::operator delete(p);
    }

private:
    alignas(std::max_align_t) std::byte room_[512];
    bool taken_ = false;
};

/// What Asio asks for that memory: the associated allocator of a handler. Source: Boost.Asio, "Custom Memory Allocation".
template <class T>
class handler_allocator {
public:
    using value_type = T;

    explicit handler_allocator(handler_memory& memory) noexcept : memory_(&memory) {}
    template <class U>
    handler_allocator(handler_allocator<U> const& other) noexcept : memory_(other.memory_) {}

    T* allocate(std::size_t count) {
        static_assert(alignof(T) <= alignof(std::max_align_t));
        return static_cast<T*>(memory_->take(count * sizeof(T)));
    }
    void deallocate(T* p, std::size_t) noexcept { memory_->give_back(p); }

    template <class U>
    bool operator==(handler_allocator<U> const& other) const noexcept {
        return memory_ == other.memory_;
    }

private:
    template <class>
    friend class handler_allocator;

    handler_memory* memory_;
};

}  // namespace varve::asio
