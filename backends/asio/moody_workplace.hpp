#pragma once

#include <boost/test/unit_test.hpp>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>

#include "failing_calls.hpp"
#include "monitor_workplace.hpp"

namespace varve_test {

/// A disk whose writes a test holds up, and fails.
class moody_disk {
public:
    moody_disk() {
        calls.on_write = [this](std::size_t, std::size_t size) -> ssize_t {
            std::unique_lock lock(mutex_);
            ++waiting_;
            changed_.notify_all();
            changed_.wait(lock, [&] { return !held_up_; });
            --waiting_;
            return error_ != 0 ? -error_ : static_cast<ssize_t>(size);
        };
    }
    void hold_up() {
        set([&] { held_up_ = true; });
    }
    void go_on(int error = 0) {
        set([&] {
            held_up_ = false;
            error_ = error;
        });
    }
    /// Waits until a write is being held up.
    void wait_for_write() {
        std::unique_lock lock(mutex_);
        BOOST_TEST_REQUIRE(changed_.wait_for(lock, 10s, [&] { return waiting_ > 0; }));
    }

    failing_calls calls;

private:
    template <class Change>
    void set(Change change) {
        std::lock_guard lock(mutex_);
        change();
        changed_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    bool held_up_ = false;
    int error_ = 0;
    int waiting_ = 0;
};

/// A trainer whose files are written by its saves alone.
struct moody_trainer : raw_trainer {
    moody_trainer(va::address const& to, std::size_t images) : raw_trainer(to, "run", images) { hello.prepare = varve::prepare_mode::none; }
};

/// A monitor that writes to such a disk. The disk goes on at the end, whatever the test found.
struct moody_workplace {
    explicit moody_workplace(
        bool unix_socket = true, std::chrono::milliseconds linger = 300ms, std::uint64_t memory_bytes = 0,
        std::function<void(va::monitor_options&)> change = [](auto&) {})
        : place(unix_socket, [&](auto& o) {
              o.calls = &disk.calls;
              o.linger = linger;
              if (memory_bytes != 0) o.memory_limit_bytes = memory_bytes;
              change(o);
          }) {}
    ~moody_workplace() { disk.go_on(); }

    moody_trainer trainer(std::size_t images) { return {place.monitor->where(), images}; }
    /// The trainer's first save becomes crash-safe, and nothing of it is on disk until that goes on.
    void save_held_up(raw_trainer& t) {
        t.greet();
        disk.hold_up();
        t.save(1, 1);
        t.peer.expect<wire::crash_safe>();
    }
    /// That trainer goes, and then the disk does not take its save.
    void loses_trainer_and_disk(raw_trainer& t) {
        save_held_up(t);
        disk.wait_for_write();
        t.peer.close();
        BOOST_TEST_REQUIRE(trainer_is_gone());
        disk.go_on(ENOSPC);
        BOOST_TEST_REQUIRE(place.store_is_free());
    }
    bool trainer_is_gone() {
        return place.becomes([](auto const& s) { return s["stores"].empty() || s["stores"][0]["trainer"] == false; });
    }

    moody_disk disk;
    workplace place;
};

/// What a fetch finds, and whether its bytes are that step's.
inline std::optional<wire::image> fetched(raw_trainer& t, va::address const& from, std::uint32_t skip = 0) {
    raw_peer peer(from);
    peer.greet(wire::purpose::fetch);
    peer.send(wire::fetch{false, 0, skip});
    auto const image = peer.expect<wire::image>();
    if (image.size_bytes == 0) return std::nullopt;
    auto const along = peer.descriptors();
    BOOST_TEST_REQUIRE(along.size() == 1u);
    BOOST_TEST(t.holds(along[0].get(), image.step));
    return image;
}

}  // namespace varve_test
