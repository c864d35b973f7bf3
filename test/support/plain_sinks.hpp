#pragma once

#include <fcntl.h>
#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <varve/concepts/sink.hpp>
#include <varve/error.hpp>
#include <varve/state.hpp>
#include <varve/system.hpp>

#include "files.hpp"
#include "gate.hpp"

namespace varve_test {

/// What a test may do to the writes of a plain_file_sink: hold them back, slow them down, fail them.
struct sink_control {
    std::chrono::milliseconds delay{0};
    std::atomic<int> fail_after{-1};  ///< writes until one fails; -1: never
    std::atomic<std::size_t> writes{0};
    gate door;  ///< before each write
};

/// The least model of a file sink: pwrite inside write(), or on a thread of its own where a test wants writes to last.
class plain_file_sink {
public:
    static constexpr bool writes_files = true;
    static constexpr bool accepts(varve::memory_kind kind) { return kind == varve::memory_kind::host; }

    explicit plain_file_sink(std::shared_ptr<sink_control> control = std::make_shared<sink_control>(),
                             varve::system_calls& calls = varve::system_calls::kernel())
        : control_(std::move(control)), calls_(&calls) {}

    class target_type {
    public:
        target_type(varve::file_descriptor fd, std::shared_ptr<sink_control> control, varve::system_calls& calls)
            : fd_(std::move(fd)), control_(std::move(control)), calls_(&calls) {}
        target_type(target_type&&) = default;
        target_type& operator=(target_type&&) = default;

        void write(std::uint64_t offset, varve::block const& b, varve::completion done) noexcept {
            // A thread a write: a test may hold one back for as long as it likes.
            std::thread([control = control_, calls = calls_, fd = fd_.get(), offset, b, done] {
                control->door.pass();
                std::this_thread::sleep_for(control->delay);
                ++control->writes;
                if (control->fail_after >= 0 && control->fail_after-- == 0) return done(std::make_error_code(std::errc::io_error));
                for (std::size_t at = 0; at < b.size_bytes;) {
                    auto n = calls->pwrite(fd, b.data + at, b.size_bytes - at, static_cast<off_t>(offset + at));
                    if (n < 0) return done(varve::last_system_error(errno));
                    at += static_cast<std::size_t>(n);
                }
                done({});
            }).detach();
        }
        std::error_code sync() noexcept { return calls_->fdatasync(fd_.get()) == 0 ? std::error_code{} : varve::last_system_error(errno); }

    private:
        varve::file_descriptor fd_;
        std::shared_ptr<sink_control> control_;
        varve::system_calls* calls_;
    };

    target_type open(varve::open_request const& r) {
        varve::file_descriptor fd(calls_->openat(r.folder, r.name.c_str(), O_RDWR | O_CREAT, 0666), *calls_);
        if (!fd) varve::throw_if(varve::last_system_error(errno), r.name);
        if (calls_->ftruncate(fd.get(), static_cast<off_t>(r.size_bytes)) != 0) varve::throw_if(varve::last_system_error(errno), r.name);
        return {std::move(fd), control_, *calls_};
    }
    varve::sink_limits limits() const { return {}; }
    std::string describe() const { return "plain file"; }

private:
    std::shared_ptr<sink_control> control_;
    varve::system_calls* calls_;
};

static_assert(varve::file_sink<plain_file_sink>);

/// A state that owns its tensors: `layers` layers of `floats` floats each, and an odd-sized one at the end of each.
class toy_model {
public:
    explicit toy_model(std::size_t layers = 4, std::size_t floats = 1000, bool odd = true) {
        for (std::size_t l = 0; l < layers; ++l) {
            varve::layer layer{"layer" + std::to_string(l), {}};
            values_.push_back(std::vector<float>(floats));
            layer.tensors.push_back(
                {"model.l" + std::to_string(l) + ".weight", varve::dtype::F32, {static_cast<std::int64_t>(floats)}, values_.back().data(), {}});
            if (odd) {
                odd_.push_back(std::make_unique<std::array<std::uint8_t, 5>>());
                layer.tensors.push_back({"model.l" + std::to_string(l) + ".odd", varve::dtype::U8, {5}, odd_.back()->data(), {}});
            }
            state_.layers.push_back(std::move(layer));
        }
    }

    varve::state& state() { return state_; }

    /// What an update does: every byte of the layer says the step.
    void update(std::size_t layer, std::uint64_t step) {
        for (auto& v : values_[layer]) v = static_cast<float>(step * 100 + layer);
        if (!odd_.empty()) odd_[layer]->fill(static_cast<std::uint8_t>(step));
    }
    void update(std::uint64_t step) {
        for (std::size_t l = 0; l < values_.size(); ++l) update(l, step);
    }

    /// Whether every byte of every layer says that step.
    bool is_of(std::uint64_t step) const {
        for (std::size_t l = 0; l < values_.size(); ++l) {
            for (auto v : values_[l])
                if (v != static_cast<float>(step * 100 + l)) return false;
            if (!odd_.empty())
                for (auto b : *odd_[l])
                    if (b != static_cast<std::uint8_t>(step)) return false;
        }
        return true;
    }

private:
    std::vector<std::vector<float>> values_;
    std::vector<std::unique_ptr<std::array<std::uint8_t, 5>>> odd_;
    varve::state state_;
};

}  // namespace varve_test
