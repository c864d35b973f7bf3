#include "ring_sinks.hpp"

#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstddef>
#include <string>

#include "varve/uring/sink.hpp"

namespace {

/// Runs a test of the faults that all file sinks share, where there is a ring.
template <class Test>
void on_a_ring(Test test) {
    varve_test::with_rings<varve::uring::sink>(test);
}

/// From here on the locked-memory limit holds, for root too.
bool lock_no_more_than(std::size_t size) {
    rlimit limit{size, size};
    if (::setrlimit(RLIMIT_MEMLOCK, &limit) != 0) return false;
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2]{};
    if (::syscall(SYS_capget, &header, data) != 0) return false;
    for (auto set : {&__user_cap_data_struct::effective, &__user_cap_data_struct::permitted, &__user_cap_data_struct::inheritable})
        data[0].*set &= ~(1u << CAP_IPC_LOCK);
    return ::syscall(SYS_capset, &header, data) == 0;
}

/// Addresses of that size, all backed by the same few pages.
class thin_memory {
public:
    thin_memory(std::size_t pages_bytes, std::size_t times)
        : size_(pages_bytes * times), fd_(::memfd_create("varve-test", MFD_CLOEXEC), varve::system_calls::kernel()),
          data_(static_cast<std::byte*>(::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_.get(), 0))) {
        if (::ftruncate(fd_.get(), static_cast<off_t>(pages_bytes)) != 0) std::abort();
        for (std::size_t i = 0; i < times; ++i)
            if (::mmap(data_ + i * pages_bytes, pages_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_.get(), 0) == MAP_FAILED)
                std::abort();
    }
    thin_memory(thin_memory const&) = delete;
    thin_memory& operator=(thin_memory const&) = delete;
    ~thin_memory() { ::munmap(data_, size_); }
    std::span<std::byte> bytes() const { return {data_, size_}; }

private:
    std::size_t size_;
    varve::file_descriptor fd_;
    std::byte* data_;
};

bool contains(std::string const& text, char const* words) { return text.find(words) != std::string::npos; }

}  // namespace

BOOST_AUTO_TEST_SUITE(uring_sink)

BOOST_AUTO_TEST_CASE(torn_writes_are_resumed) {
    on_a_ring([](auto& f) { f.torn_writes_are_resumed(); });
}
BOOST_AUTO_TEST_CASE(interrupted_writes_are_repeated) {
    on_a_ring([](auto& f) { f.interrupted_writes_are_repeated(); });
}
BOOST_AUTO_TEST_CASE(a_failed_write_says_why_and_harms_no_other) {
    on_a_ring([](auto& f) { f.a_failed_write_says_why_and_harms_no_other(); });
}
BOOST_AUTO_TEST_CASE(a_failed_sync_fails_for_ever) {
    on_a_ring([](auto& f) { f.a_failed_sync_fails_for_ever(); });
}
BOOST_AUTO_TEST_CASE(without_o_direct_it_writes_buffered_and_says_so) {
    on_a_ring([](auto& f) { f.without_o_direct_it_writes_buffered_and_says_so(); });
}
BOOST_AUTO_TEST_CASE(unaligned_blocks_are_written_all_the_same) {
    on_a_ring([](auto& f) { f.unaligned_blocks_are_written_all_the_same(); });
}
BOOST_AUTO_TEST_CASE(an_open_that_fails_says_what_where_and_what_to_do) {
    on_a_ring([](auto& f) { f.an_open_that_fails_says_what_where_and_what_to_do(); });
}
BOOST_AUTO_TEST_CASE(a_thousand_opens_leave_no_descriptor) {
    on_a_ring([](auto& f) { f.a_thousand_opens_leave_no_descriptor(); });
}
BOOST_AUTO_TEST_CASE(many_threads_write_many_blocks) {
    on_a_ring([](auto& f) { f.many_threads_write_many_blocks(); });
}

BOOST_AUTO_TEST_CASE(a_thread_that_ends_takes_no_write_with_it) {
    on_a_ring([](auto& f) { f.a_thread_that_ends_takes_no_write_with_it(); });
}

BOOST_AUTO_TEST_CASE(a_refused_ring_is_unsupported_and_says_so) { varve_test::a_refused_ring_is_unsupported_and_says_so<varve::uring::sink>(); }

BOOST_AUTO_TEST_CASE(memory_that_may_not_be_locked_runs_unregistered_and_names_the_limit) {
    if (auto refused = varve::uring::sink::available()) return varve_test::skip("no io_uring: " + refused.message());
    varve_test::scratch_folder folder;
    int status = varve_test::in_a_child([&] {
        if (!lock_no_more_than(1u << 20)) return 77;
        auto bytes = varve_test::some_bytes((8u << 20) + 100);
        varve::uring::sink sink;
        int slot = sink.register_memory(bytes.bytes());
        if (slot != varve::unregistered) return 1;
        if (!contains(sink.describe(), "unregistered memory") || !contains(sink.describe(), "RLIMIT_MEMLOCK, which is 1024 KiB")) return 2;
        auto target = sink.open(folder.request(0, bytes.size()));
        std::binary_semaphore came{0};
        target.write(0, {bytes.data(), bytes.size(), varve::memory_kind::host, slot},
                     {[](void* to, std::error_code e) noexcept {
                          if (!e) static_cast<std::binary_semaphore*>(to)->release();
                      },
                      &came});
        if (!came.try_acquire_for(std::chrono::seconds(60))) ::_exit(3);
        return target.sync() ? 4 : varve_test::holds(folder, bytes) ? 0 : 5;
    });
    if (status == 77) return varve_test::skip("the limits cannot be lowered");
    BOOST_TEST(status == 0);
}

BOOST_AUTO_TEST_CASE(a_region_of_more_than_a_gib_is_registered_in_pieces) {
    if (auto refused = varve::uring::sink::available()) return varve_test::skip("no io_uring: " + refused.message());
    varve_test::scratch_folder folder;
    constexpr std::size_t gib = 1u << 30, thin = 32u << 20;
    thin_memory memory(thin, gib / thin + 2);
    auto content = varve_test::some_bytes(thin);
    std::copy(content.bytes().begin(), content.bytes().end(), memory.bytes().begin());
    varve::uring::sink sink;
    int slot = sink.register_memory(memory.bytes());
    if (slot == varve::unregistered) return varve_test::skip("memory cannot be registered: " + sink.describe());
    BOOST_TEST_MESSAGE(sink.describe());
    auto target = sink.open(folder.request(0, thin));
    // Before, across and behind the end of the first piece.
    for (std::size_t at : {std::size_t{0}, gib - thin, gib})
        for (std::size_t part = 0; part < thin; part += thin / 4)
            BOOST_TEST(!varve_test::write_and_wait(target, part, memory.bytes().subspan(at + part, thin / 4), slot));
    BOOST_TEST(!varve_test::write_and_wait(target, 0, memory.bytes().subspan(gib - thin / 2, thin / 2), slot));
    auto across = memory.bytes().subspan(gib - (4u << 20), 8u << 20);
    BOOST_TEST(!varve_test::write_and_wait(target, 0, across, slot));
    BOOST_TEST(!target.sync());
    auto kept = folder.content(0);
    BOOST_TEST(std::equal(across.begin(), across.end(), kept.begin()));
}

BOOST_AUTO_TEST_CASE(a_slot_that_does_not_hold_the_bytes_is_ignored) {
    on_a_ring([](auto&) {
        varve_test::scratch_folder folder;
        auto registered = varve_test::some_bytes(1u << 20), other = varve_test::some_bytes(1u << 20);
        other.data()[5] = std::byte{0xaa};
        varve::uring::sink sink;
        int slot = sink.register_memory(registered.bytes());
        auto target = sink.open(folder.request(0, other.size()));
        for (int s : {slot, slot + 1, 4711, -3}) {
            BOOST_TEST(!varve_test::write_and_wait(target, 0, other.bytes(), s));
            BOOST_TEST(varve_test::holds(folder, other));
        }
    });
}

BOOST_AUTO_TEST_SUITE_END()
