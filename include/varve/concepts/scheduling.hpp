#pragma once

#include <concepts>
#include <cstddef>
#include <limits>

namespace varve {

/// N is given at run time, as with std::dynamic_extent.
inline constexpr std::size_t dynamic = std::numeric_limits<std::size_t>::max();

/// When a layer's bytes may leave its tensors.
enum class copy_moment {
    at_seal,        ///< when the whole update is done
    at_layer_ready  ///< as soon as the layer's own update is done
};

/// What the training thread waits for before seal returns.
enum class seal_wait { nothing, staged, durable };

/// P satisfies `scheduling`, which decides when bytes leave the tensors and what training waits for, if:
///  1. `copies` is a static constexpr copy_moment and `waits` a static constexpr seal_wait;
///  2. `needs_fixed_layout` is a static constexpr bool: whether blocks leave before the whole state was seen;
///  3. `max_in_flight()` gives N, at least 1: how many saves may be in flight before begin() blocks, skips or replaces.
/// It need not move a byte: one loop in the checkpointer serves all of them.
template <class P>
concept scheduling = std::copyable<P> && requires(P const& p) {
    { P::copies } -> std::convertible_to<copy_moment>;
    { P::waits } -> std::convertible_to<seal_wait>;
    { P::needs_fixed_layout } -> std::convertible_to<bool>;
    { p.max_in_flight() } -> std::same_as<std::size_t>;
};

/// Explains, one line a member, what P lacks to be a scheduling. Instantiate it where `scheduling<P>` fails.
template <class P>
consteval bool explain_scheduling() {
    static_assert(std::copyable<P>, "varve: a scheduling must be copyable");
    static_assert(
        requires {
            { P::copies } -> std::convertible_to<copy_moment>;
        }, "varve: a scheduling must have static constexpr varve::copy_moment copies");
    static_assert(
        requires {
            { P::waits } -> std::convertible_to<seal_wait>;
        }, "varve: a scheduling must have static constexpr varve::seal_wait waits");
    static_assert(
        requires {
            { P::needs_fixed_layout } -> std::convertible_to<bool>;
        }, "varve: a scheduling must have static constexpr bool needs_fixed_layout");
    static_assert(
        requires(P const& p) {
            { p.max_in_flight() } -> std::same_as<std::size_t>;
        }, "varve: a scheduling must have std::size_t max_in_flight() const");
    return scheduling<P>;
}

namespace detail {

/// N saves in flight, fixed or given at run time.
template <std::size_t N>
class in_flight_limit {
public:
    static_assert(N >= 1, "varve: at least one save must be in flight");
    constexpr std::size_t max_in_flight() const noexcept { return N; }
};

template <>
class in_flight_limit<dynamic> {
public:
    explicit constexpr in_flight_limit(std::size_t n) noexcept : n_(n == 0 ? 1 : n) {}
    constexpr std::size_t max_in_flight() const noexcept { return n_; }

private:
    std::size_t n_;
};

}  // namespace detail
}  // namespace varve
