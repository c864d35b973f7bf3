#include "report_data.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace varve::tool::reporting {

namespace {

// Two-sided 95% points of Student's t for 1 to 4 degrees of freedom.
constexpr std::array<double, 4> t_95{12.706, 4.303, 3.182, 2.776};

// The largest k for which the k-th smallest and k-th largest of n bound the median with 95%: P(X < k) <= 0.025
// for X from a binomial of n and 1/2 (David and Nagaraja, Order Statistics, 7.1).
std::size_t order_statistic_95(std::size_t n) {
    auto const count = static_cast<double>(n);
    double sum = 0;
    std::size_t k = 0;
    for (std::size_t i = 0; i < n; ++i) {
        auto const at = static_cast<double>(i);
        sum += std::exp(std::lgamma(count + 1) - std::lgamma(at + 1) - std::lgamma(count - at + 1) - count * std::log(2.0));
        if (sum > 0.025) break;
        k = i + 1;
    }
    return std::max<std::size_t>(k, 1);
}

double median(std::vector<double> const& sorted) {
    auto const half = sorted.size() / 2;
    return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

}  // namespace

// Few ratios: the t interval of their logarithms, wide as it is. From six on: order statistics, which assume nothing.
noise_verdict judge(std::vector<double> ratios) {
    std::sort(ratios.begin(), ratios.end());
    noise_verdict verdict;
    verdict.repeats = ratios.size();
    verdict.ratio = median(ratios);
    auto const n = ratios.size();
    if (n >= 6) {
        auto const k = order_statistic_95(n);
        verdict.low = ratios[k - 1];
        verdict.high = ratios[n - k];
    } else {
        double mean = 0, square = 0;
        for (auto const ratio : ratios) mean += std::log(ratio) / static_cast<double>(n);
        for (auto const ratio : ratios) square += std::pow(std::log(ratio) - mean, 2);
        auto const error = std::sqrt(square / static_cast<double>(n - 1) / static_cast<double>(n));
        verdict.low = std::exp(mean - t_95[n - 2] * error);
        verdict.high = std::exp(mean + t_95[n - 2] * error);
    }
    verdict.within_noise = verdict.low <= 1 && verdict.high >= 1;
    return verdict;
}

// One run says nothing about the next one, but its own scatter bounds what it can tell: the steps and the saves vary by
// their standard deviations, so a sum of n of them varies by sqrt(n) times that. Twice this for each of two methods,
// relative to the run; never below 3%, because runs differ by more than their steps do.
double single_run_noise_percent(result_file const& file) {
    constexpr double least = 3, unknown = 5;
    auto const steps = file.number("config.training.num_steps");
    double noise = 0;
    for (auto const& method : file.methods) {
        auto const time = method.number("drained_time_sec");
        auto const step = method.number("training_step.std_ms");
        if (!time || *time <= 0 || !step || !steps) continue;
        auto const save = method.number("checkpoint.std_ms").value_or(0);
        auto const count = method.number("checkpoint.count").value_or(0);
        auto const scatter_ms = std::sqrt(*step * *step * *steps + save * save * count);
        noise = std::max(noise, 2 * std::sqrt(2.0) * scatter_ms / (*time * 1e3) * 100);
    }
    return noise > 0 ? std::max(noise, least) : unknown;
}

std::optional<noise_verdict> compare(result_file const& file, method_result const& method, method_result const& base, std::string_view path) {
    auto const value = method.number(path), other = base.number(path);
    if (!value || !other || *value <= 0 || *other <= 0) return std::nullopt;
    auto const values = method.repeats(path), others = base.repeats(path);
    if (values.size() >= 2 && values.size() == others.size()) {
        std::vector<double> ratios;
        for (std::size_t i = 0; i < values.size(); ++i)
            if (values[i] > 0 && others[i] > 0) ratios.push_back(values[i] / others[i]);
        if (ratios.size() == values.size()) return judge(std::move(ratios));
    }
    noise_verdict verdict;
    auto const noise = single_run_noise_percent(file) / 100;
    verdict.ratio = *value / *other;
    verdict.low = verdict.ratio * (1 - noise);
    verdict.high = verdict.ratio * (1 + noise);
    verdict.within_noise = std::abs(verdict.ratio - 1) <= noise;
    return verdict;
}

}  // namespace varve::tool::reporting
