#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <varve/concepts/relaying_sink.hpp>
#include <varve/error.hpp>

namespace varve_test {

/// What a test sees of a receiving_sink, and what it makes the receiver answer.
class receiver {
public:
    struct save {
        std::vector<std::byte> bytes;  ///< of the whole image, without its header
        std::vector<varve::loan> loans;
        varve::commit_values values;
        std::vector<std::uint64_t> digests;
        varve::completion crash_safe, durable;
        bool handed = false;
        bool gone = false;  ///< its target was destroyed
    };

    bool takes_digests = true;
    bool keeps_loans = false;
    std::error_code refuses;  ///< what introduce throws
    std::function<std::error_code(std::size_t write)> on_write;
    std::vector<std::string> introduced;
    varve::when_busy busy = varve::when_busy::block;
    std::size_t in_flight = 0;
    std::function<std::optional<varve::fetched_checkpoint>(std::optional<std::uint64_t>, std::uint32_t)> on_fetch;

    /// Waits until the n-th save (from 0) was handed over.
    bool was_handed(std::size_t n) {
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, std::chrono::seconds(30), [&] { return saves.size() > n && saves[n]->handed; });
    }
    void say_crash_safe(std::size_t n, std::error_code ec = {}) { answer(n, &save::crash_safe, ec); }
    void say_durable(std::size_t n, std::error_code ec = {}) { answer(n, &save::durable, ec); }
    /// Waits until the n-th save has lent that many blocks.
    bool has_loans(std::size_t n, std::size_t count) {
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, std::chrono::seconds(30), [&] { return saves.size() > n && saves[n]->loans.size() >= count; });
    }
    std::vector<varve::loan> take_loans(std::size_t n) {
        std::lock_guard lock(mutex);
        return std::exchange(saves.at(n)->loans, {});
    }
    std::size_t loans(std::size_t n) {
        std::lock_guard lock(mutex);
        return saves.at(n)->loans.size();
    }
    bool gone(std::size_t n) {
        std::lock_guard lock(mutex);
        return saves.at(n)->gone;
    }

    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<save>> saves;
    std::size_t writes = 0;

private:
    void answer(std::size_t n, varve::completion save::* which, std::error_code ec) {
        std::lock_guard lock(mutex);
        if (!saves.at(n)->gone) ((*saves.at(n)).*which)(ec);
    }
};

/// A relaying sink whose receiver is the test.
class receiving_sink {
public:
    static constexpr bool accepts(varve::memory_kind) { return true; }
    explicit receiving_sink(std::shared_ptr<receiver> to) : to_(std::move(to)) {}

    class target_type {
    public:
        target_type(std::shared_ptr<receiver> to, std::shared_ptr<receiver::save> save) : to_(std::move(to)), save_(std::move(save)) {}
        target_type(target_type&&) noexcept = default;
        target_type& operator=(target_type&&) noexcept = default;
        ~target_type() {
            if (!to_) return;
            std::lock_guard lock(to_->mutex);
            save_->gone = true;
            save_->loans.clear();
        }

        void write(std::uint64_t offset, varve::block const& b, varve::completion done) noexcept { write(offset, b, done, {}); }
        void write(std::uint64_t offset, varve::block const& b, varve::completion done, varve::loan l) noexcept {
            std::error_code ec;
            {
                std::lock_guard lock(to_->mutex);
                ec = to_->on_write ? to_->on_write(to_->writes++) : std::error_code{};
                if (!ec) std::memcpy(save_->bytes.data() + offset, b.data, b.size_bytes);
                if (!ec && to_->keeps_loans) save_->loans.push_back(std::move(l));
            }
            to_->changed.notify_all();
            done(ec);
        }
        std::error_code sync() noexcept { return varve::errc::unsupported; }
        void hand_over(varve::commit_values const& values, std::span<std::uint64_t const> digests, varve::completion crash_safe,
                       varve::completion durable) noexcept {
            std::lock_guard lock(to_->mutex);
            save_->values = values;
            save_->digests.assign(digests.begin(), digests.end());
            save_->crash_safe = crash_safe;
            save_->durable = durable;
            save_->handed = true;
            to_->changed.notify_all();
        }

    private:
        std::shared_ptr<receiver> to_;
        std::shared_ptr<receiver::save> save_;
    };

    void introduce(varve::relayed_run const& run) {
        varve::throw_if(to_->refuses, "introduce");
        to_->introduced.push_back(std::string(run.extension) + " " + std::to_string(run.layout.size_bytes) + " " + std::to_string(run.block_bytes));
        to_->busy = run.busy;
        to_->in_flight = run.in_flight;
    }
    bool takes_digests() const noexcept { return to_->takes_digests; }
    std::optional<varve::fetched_checkpoint> fetch(std::optional<std::uint64_t> step, std::uint32_t skip) { return to_->on_fetch(step, skip); }

    target_type open(varve::open_request const& r) {
        auto save = std::make_shared<receiver::save>();
        save->bytes.resize(r.size_bytes);
        std::lock_guard lock(to_->mutex);
        to_->saves.push_back(save);
        return {to_, save};
    }
    varve::sink_limits limits() const { return {}; }
    std::string describe() const { return "to the test"; }

private:
    std::shared_ptr<receiver> to_;
};

static_assert(varve::relaying_sink<receiving_sink> && varve::fetching_sink<receiving_sink> && !varve::file_sink<receiving_sink>);
static_assert(varve::explain_relaying_sink<receiving_sink>());

}  // namespace varve_test
