#pragma once

#include <nvtx3/nvToolsExt.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "varve/observer.hpp"

namespace varve::cuda {

/// An observer that names the phases of every save in a profile: one range from its begin to its end, and inside it `leaves
/// the tensors` until it is staged, `written` until its last write is done, `made durable` until it is committed; a mark for
/// each layer that is announced and copied, and for each write.
///
/// Ranges of saves in flight overlap, as the saves do, in a domain `varve`. Where no profiler is attached, which is asked
/// once, at construction, each event costs one comparison. Thread-safe. Source: NVTX 3, nvtxDomainRangeStartEx.
class nvtx_observer {
public:
    nvtx_observer() noexcept : domain_(::nvtxDomainCreateA("varve")) {}
    nvtx_observer(nvtx_observer const&) = delete;
    nvtx_observer& operator=(nvtx_observer const&) = delete;
    ~nvtx_observer() {
        if (domain_) ::nvtxDomainDestroy(domain_);
    }

    /// Whether a profiler listens.
    bool attached() const noexcept { return domain_ != nullptr; }

    void on(varve::event const& e) noexcept {
        if (!domain_) return;
        try {
            auto const save = "save " + std::to_string(e.step);
            switch (e.what) {
            case milestone::begin: begin(e.step, save); break;
            case milestone::staged: next_phase(e.step, save + ": written"); break;
            case milestone::written: next_phase(e.step, save + ": made durable"); break;
            case milestone::durable:
            case milestone::failed:
            case milestone::skipped:
            case milestone::replaced: end(e.step, save + ": " + std::string(name(e.what))); break;
            case milestone::layer_ready:
            case milestone::layer_copied: mark(save + ": " + std::string(name(e.what)) + " " + std::string(e.layer)); break;
            case milestone::write: mark(save + ": write of " + std::to_string(e.bytes) + " bytes"); break;
            case milestone::crash_safe: mark(save + ": crash-safe"); break;
            case milestone::restored: mark(save + ": restored"); break;
            }
        } catch (std::bad_alloc const&) {
            // The profile lacks a name.
        }
    }

private:
    struct ranges {
        nvtxRangeId_t whole, phase;
    };

    static nvtxEventAttributes_t attributes(std::string const& text) noexcept {
        nvtxEventAttributes_t a{};
        a.version = NVTX_VERSION;
        a.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
        a.messageType = NVTX_MESSAGE_TYPE_ASCII;
        a.message.ascii = text.c_str();
        return a;
    }
    nvtxRangeId_t start(std::string const& text) noexcept {
        auto const a = attributes(text);
        return ::nvtxDomainRangeStartEx(domain_, &a);
    }
    void mark(std::string const& text) noexcept {
        auto const a = attributes(text);
        ::nvtxDomainMarkEx(domain_, &a);
    }

    void begin(std::uint64_t step, std::string const& save) {
        ranges const r{start(save), start(save + ": leaves the tensors")};
        std::lock_guard lock(mutex_);
        open_[step] = r;
    }
    void next_phase(std::uint64_t step, std::string const& text) {
        std::lock_guard lock(mutex_);
        auto const found = open_.find(step);
        if (found == open_.end()) return;
        ::nvtxDomainRangeEnd(domain_, found->second.phase);
        found->second.phase = start(text);
    }
    /// A save that promises no durability ends with its last phase open; the next save of that step, or nobody, closes it.
    void end(std::uint64_t step, std::string const& text) {
        mark(text);
        std::lock_guard lock(mutex_);
        auto const found = open_.find(step);
        if (found == open_.end()) return;
        ::nvtxDomainRangeEnd(domain_, found->second.phase);
        ::nvtxDomainRangeEnd(domain_, found->second.whole);
        open_.erase(found);
    }

    nvtxDomainHandle_t domain_;
    std::mutex mutex_;
    std::map<std::uint64_t, ranges> open_;
};

static_assert(observer<nvtx_observer>);

}  // namespace varve::cuda
