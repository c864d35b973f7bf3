#include "signals.hpp"

#include <atomic>
#include <csignal>
#include <initializer_list>

namespace varve::tool {

namespace {

std::atomic<int> signal_count{0};
static_assert(std::atomic<int>::is_always_lock_free);

extern "C" void count_signal(int) { signal_count.fetch_add(1, std::memory_order_relaxed); }

void install(void (*handler)(int), int flags) {
    struct sigaction action{};
    action.sa_handler = handler;
    action.sa_flags = flags;
    sigemptyset(&action.sa_mask);
    for (int s : {SIGINT, SIGTERM}) sigaction(s, &action, nullptr);
}

}  // namespace

// SA_RESTART: nothing below us has to deal with EINTR; who waits for a child asks for the flag with a timeout.
stop_signals::stop_signals(bool second_ends) { install(count_signal, SA_RESTART | (second_ends ? static_cast<int>(SA_RESETHAND) : 0)); }
stop_signals::~stop_signals() { install(SIG_DFL, 0); }
int stop_signals::count() noexcept { return signal_count.load(std::memory_order_relaxed); }

}  // namespace varve::tool
