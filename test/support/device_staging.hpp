#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <system_error>

#include <varve/concepts/staging.hpp>
#include <varve/detail/digest.hpp>
#include <varve/staging/host.hpp>

namespace varve_test {

/// Says that its buffers are in GPU memory, which the library must then not read itself; in truth they are on the host.
class device_staging : public varve::host_staging {
public:
    static constexpr varve::memory_kind memory = varve::memory_kind::device;

    struct control {
        std::atomic<std::size_t> hashed{0};  ///< blocks
        std::atomic<int> fail_after{-1};     ///< blocks until one cannot be hashed; -1: never
        std::uint64_t spoil = 0;             ///< goes into every digest
    };

    device_staging(std::size_t pool_bytes, std::size_t block_bytes, std::shared_ptr<control> c = std::make_shared<control>())
        : host_staging(pool_bytes, block_bytes), control_(std::move(c)) {}

    std::error_code digest(buffer_type const& buffer, std::size_t size_bytes, std::span<std::uint64_t> out) noexcept {
        ++control_->hashed;
        if (control_->fail_after >= 0 && control_->fail_after-- == 0) return std::make_error_code(std::errc::bad_address);
        auto n = varve::detail::chunk_digests({buffer.data(), size_bytes}, out);
        for (auto& d : out.first(n)) d ^= control_->spoil;
        return {};
    }

private:
    std::shared_ptr<control> control_;
};

static_assert(varve::digesting_staging<device_staging> && !varve::digesting_staging<varve::host_staging>);

}  // namespace varve_test
