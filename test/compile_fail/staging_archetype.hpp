#pragma once

#include <cstddef>
#include <span>
#include <stop_token>
#include <system_error>

#include <varve/concepts/staging.hpp>

/// The least that satisfies `staging`; the wrong models each take one thing away from it.
struct least_staging {
    static constexpr varve::memory_kind memory = varve::memory_kind::host;
    struct order_type {};
    struct point_type {};
    struct token_type {
        std::error_code wait() const noexcept { return {}; }
    };
    struct buffer_type {
        buffer_type() = default;
        buffer_type(buffer_type&&) = default;
        buffer_type& operator=(buffer_type&&) = default;
        std::byte* data() const { return nullptr; }
        std::size_t region() const { return 0; }
        explicit operator bool() const { return false; }
    };
    buffer_type acquire(std::stop_token) { return {}; }
    point_type record(order_type) noexcept { return {}; }
    token_type copy(buffer_type&, std::span<varve::copy_range const>, point_type const&) noexcept { return {}; }
    std::error_code order_after(token_type const&, order_type) noexcept { return {}; }
    std::size_t block_bytes() const { return 0; }
    std::size_t block_count() const { return 0; }
    std::span<std::span<std::byte> const> regions() const { return {}; }
};
