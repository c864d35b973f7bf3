#include <boost/test/unit_test.hpp>

#include <unistd.h>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "moody_workplace.hpp"

// A pool in a GPU's memory, as a monitor has it; here a memfd stands for that memory, which is reached through its descriptor alone.

namespace varve_test {

namespace {

/// What a test's GPU does, and was asked.
struct pretended_gpu {
    std::atomic<bool> broken = false;
    std::atomic<std::size_t> reads = 0, open = 0;

    std::function<void(va::monitor_options&)> in() {
        return [this](va::monitor_options& o) {
            o.device_memory = [this](varve::file_descriptor region, std::uint64_t, std::string const& device) -> std::unique_ptr<va::device_reader> {
                if (device != "gpu") throw varve::error(varve::errc::unsupported, "no such GPU");
                return std::make_unique<reader>(*this, std::move(region));
            };
        };
    }

private:
    class reader final : public va::device_reader {
    public:
        reader(pretended_gpu& of, varve::file_descriptor region) : of_(of), region_(std::move(region)) { ++of_.open; }
        ~reader() override { --of_.open; }
        std::shared_ptr<std::byte> host_memory(std::size_t size_bytes) override {
            return {static_cast<std::byte*>(std::aligned_alloc(4096, size_bytes)), [](std::byte* p) { std::free(p); }};
        }
        std::error_code read(std::uint64_t offset_bytes, std::span<std::byte> to) noexcept override {
            ++of_.reads;
            if (of_.broken) return std::make_error_code(std::errc::io_error);
            auto const n = ::pread(region_.get(), to.data(), to.size(), static_cast<off_t>(offset_bytes));
            return n == static_cast<ssize_t>(to.size()) ? std::error_code() : std::make_error_code(std::errc::io_error);
        }

    private:
        pretended_gpu& of_;
        varve::file_descriptor region_;
    };
};

struct gpu_trainer : moody_trainer {
    gpu_trainer(va::address const& to, std::size_t images) : moody_trainer(to, images) { hello.device = "gpu"; }
};

struct gpu_workplace {
    explicit gpu_workplace(std::chrono::milliseconds linger = 20s, std::uint64_t memory_bytes = 0) : moody(true, linger, memory_bytes, gpu.in()) {}
    gpu_trainer trainer(std::size_t images) { return {place.monitor->where(), images}; }

    pretended_gpu gpu;
    moody_workplace moody;
    workplace& place = moody.place;
};

/// Places for four blocks, and for one image.
std::uint64_t host_bytes(raw_trainer const& t) { return 4 * raw_trainer::block_bytes + t.layout.size_bytes; }

}  // namespace

BOOST_AUTO_TEST_CASE(what_a_trainer_left_in_gpu_memory_is_committed_and_lingers) {
    for (std::size_t images : {1, 2}) {
        gpu_workplace w;
        auto t = w.trainer(images);
        t.greet();
        BOOST_TEST(w.place.status()["memory_used_bytes"] == host_bytes(t));
        t.save(1, 1);
        t.peer.expect<wire::durable>();
        t.save(2, 2, images - 1);
        t.peer.expect<wire::crash_safe>();
        // The next one is in flight, and has a block where there is a place for one that is nobody's.
        t.begin(3, 3);
        if (images == 2) {
            t.free_image();
            t.set(3);
            t.send_block(3, 0, 0);
        }
        t.peer.close();
        BOOST_TEST_REQUIRE(w.place.store_is_free());
        BOOST_TEST(t.holds(w.place.file(1), 1));
        BOOST_TEST(t.holds(w.place.file(2), 2));
        BOOST_TEST(!std::filesystem::exists(w.place.file(3)));
        BOOST_TEST(w.gpu.open == 0u);
        // A pool of one image keeps nothing: the next save needs it.
        auto const image = fetched(t, w.place.monitor->where());
        BOOST_TEST_REQUIRE(image.has_value());
        BOOST_TEST(image->step == 2u);
        BOOST_TEST(image->in_memory == (images == 2));
        BOOST_TEST(w.place.status()["memory_used_bytes"] == (images == 2 ? t.layout.size_bytes : 0));
    }
}

BOOST_AUTO_TEST_CASE(while_the_disk_stands_still_gpu_memory_is_read_for_what_is_written_alone) {
    gpu_workplace w;
    auto t = w.trainer(3);
    t.hello.busy = varve::when_busy::replace;
    w.moody.save_held_up(t);
    w.moody.disk.wait_for_write();
    constexpr std::uint64_t saves = 12;
    for (std::uint64_t i = 2; i <= saves; ++i) {
        t.save(i, i, t.free_image());
        BOOST_TEST(t.peer.expect<wire::crash_safe>().save == i);
    }
    w.moody.disk.go_on();
    BOOST_TEST(t.peer.expect<wire::durable>().save == 1u);
    BOOST_TEST(t.peer.expect<wire::durable>().save == saves);
    BOOST_TEST(t.holds(w.place.file(1), 1));
    BOOST_TEST(t.holds(w.place.file(saves), saves));
    BOOST_TEST(w.gpu.reads == 2 * t.plans.size());
}

BOOST_AUTO_TEST_CASE(gpu_memory_that_cannot_be_read_fails_its_save_alone) {
    gpu_workplace w;
    auto t = w.trainer(2);
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    w.gpu.broken = true;
    t.save(2, 2, 1);
    auto const failed = t.peer.expect<wire::failed>();
    BOOST_TEST(failed.save == 2u);
    BOOST_TEST((failed.code == std::errc::io_error), failed.text);
    BOOST_TEST(!std::filesystem::exists(w.place.file(2)));
    w.gpu.broken = false;
    while (t.peer.on_loan.size() > t.plans.size()) t.peer.expect<wire::release>();
    t.save(3, 3, 1);
    t.peer.expect<wire::durable>();
    BOOST_TEST(t.holds(w.place.file(3), 3));
    BOOST_TEST(t.holds(w.place.file(1), 1));
}

BOOST_AUTO_TEST_CASE(what_gpu_memory_alone_has_lingers_though_the_disk_is_full_and_no_more_memory_is_there) {
    std::uint64_t least = 0;
    {
        gpu_workplace w;
        least = host_bytes(w.trainer(2));
    }
    gpu_workplace w(20s, least);
    auto t = w.trainer(2);
    w.moody.loses_trainer_and_disk(t);
    auto const image = fetched(t, w.place.monitor->where());
    BOOST_TEST_REQUIRE(image.has_value());
    BOOST_TEST(image->in_memory);
    BOOST_TEST(image->step == 1u);
}

BOOST_AUTO_TEST_CASE(without_room_for_an_image_a_pool_in_gpu_memory_is_committed_and_does_not_linger) {
    gpu_workplace w(20s, 4 * raw_trainer::block_bytes + (1u << 20));
    auto t = w.trainer(2);
    t.greet();
    BOOST_TEST(w.place.status()["memory_used_bytes"] == 4 * raw_trainer::block_bytes);
    BOOST_TEST(w.place.status()["stores"][0]["pool_bytes"] == t.pool_bytes);
    t.save(1, 1);
    t.peer.expect<wire::crash_safe>();
    t.peer.close();
    BOOST_TEST_REQUIRE(w.place.store_is_free());
    auto const image = fetched(t, w.place.monitor->where());
    BOOST_TEST_REQUIRE(image.has_value());
    BOOST_TEST(!image->in_memory);
    BOOST_TEST(image->step == 1u);
}

BOOST_AUTO_TEST_CASE(a_pool_in_gpu_memory_is_refused_in_one_line_where_it_cannot_be_read) {
    auto const refused = [](workplace& w, std::string const& device, std::string const& words) {
        auto t = w.trainer(1);
        t.hello.device = device;
        t.peer.send(t.hello, {t.memory.get()});
        auto const why = t.peer.refusal();
        BOOST_TEST(has(why, words), why);
        BOOST_TEST(!has(why, "\n"));
        BOOST_TEST(w.store_is_free());
        BOOST_TEST(w.becomes([](auto const& s) { return s["memory_used_bytes"] == 0; }));
    };
    workplace without;
    refused(without, "gpu", "built with CUDA");
    gpu_workplace w;
    refused(w.place, "another", "no such GPU");
    gpu_workplace small(20s, 15u << 20);
    refused(small.place, "gpu", "--memory-mb");
    // No regions, and a GPU all the same.
    auto t = w.place.trainer(0);
    t.hello.device = "gpu";
    t.peer.send(t.hello);
    BOOST_TEST(has(t.peer.refusal(), "no region of its memory"));
}

}  // namespace varve_test
