#pragma once

#include <pthread.h>

namespace varve::detail {

/// What a profile, a debugger and `top -H` call the calling thread; at most 15 characters. Source: pthread_setname_np(3).
inline void name_this_thread(char const* name) noexcept { ::pthread_setname_np(::pthread_self(), name); }

}  // namespace varve::detail
