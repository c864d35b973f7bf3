#include "report_data.hpp"

#include <algorithm>
#include <cmath>

namespace varve::tool::reporting {

namespace {

using method_list = std::vector<method_result const*>;

std::string percent(double value) { return (value > 0 ? "+" : "") + format_number(value, std::abs(value) < 1 ? 1 : 2) + "%"; }

std::string times(double value) { return format_number(value, 2) + " times"; }

std::string named(method_result const& method) { return markdown_text(method.name); }

std::string joined(std::vector<std::string> const& parts) {
    std::string text;
    for (std::size_t i = 0; i < parts.size(); ++i) text += (i == 0 ? "" : i + 1 == parts.size() ? " and " : ", ") + parts[i];
    return text;
}

method_list checkpointing(result_file const& file) {
    method_list methods;
    for (auto const& method : file.methods)
        if (method.name != none_name) methods.push_back(&method);
    return methods;
}

std::string interval(noise_verdict const& verdict) {
    if (verdict.repeats < 2) return {};
    return " (95% interval " + format_number(verdict.low) + " to " + format_number(verdict.high) + ", " + std::to_string(verdict.repeats) +
           " repeats)";
}

// Its time and what that is over training without checkpoints: "15.7 s (+43%)".
std::string time_and_overhead(result_file const& file, method_result const& method) {
    auto const* none = file.none();
    auto const time = method.number("drained_time_sec");
    auto const base = none != nullptr ? none->number("drained_time_sec") : std::nullopt;
    auto overhead = method.number("overhead_vs_none_percent");
    if (!overhead && time && base && *base > 0) overhead = 100 * (*time / *base - 1);
    auto text = time ? format_number(*time) + " s" : std::string();
    if (!overhead) return text;
    auto const verdict = none != nullptr ? compare(file, method, *none, "drained_time_sec") : std::nullopt;
    return text + " (" + percent(*overhead) + (verdict && verdict->within_noise ? ", within the noise)" : ")");
}

// Methods by the time until everything is durable, the cheapest first.
method_list by_cost(result_file const& file) {
    auto methods = checkpointing(file);
    std::erase_if(methods, [](auto const* method) { return !method->number("drained_time_sec"); });
    std::stable_sort(methods.begin(), methods.end(),
                     [](auto const* a, auto const* b) { return *a->number("drained_time_sec") < *b->number("drained_time_sec"); });
    return methods;
}

// The cheapest one and those that the result cannot tell from it.
std::vector<std::string> cheapest(result_file const& file) {
    auto const methods = by_cost(file);
    std::vector<std::string> names;
    for (auto const* method : methods) {
        auto const verdict = compare(file, *method, *methods.front(), "drained_time_sec");
        if (method == methods.front() || (verdict && verdict->within_noise)) names.push_back(named(*method));
    }
    return names;
}

std::string least_cost(result_file const& file) {
    auto const methods = by_cost(file);
    if (methods.empty()) return {};
    auto const best = cheapest(file);
    std::string text;
    if (methods.size() == 1)
        text = "Until its last checkpoint is durable, a run takes ";
    else if (best.size() == 1)
        text = "**" + best.front() + " costs least.** Until its last checkpoint is durable, a run takes ";
    else
        text = "**" + joined(best) + " cost least; the difference between them is within the noise.** Until its last " +
               "checkpoint is durable, a run takes ";
    std::vector<std::string> parts;
    for (auto const* method : methods) parts.push_back(time_and_overhead(file, *method) + " with " + named(*method));
    text += joined(parts);
    auto const* none = file.none();
    if (auto const time = none != nullptr ? none->number("drained_time_sec") : std::nullopt)
        text += "; without checkpoints it takes " + format_number(*time) + " s";
    return text + ".";
}

// Whether the means of two methods' saves differ by less than twice the error of their difference.
bool saves_alike(method_result const& a, method_result const& b) {
    auto variance = [](method_result const& m) {
        auto const count = std::max(1.0, m.number("checkpoint.count").value_or(1));
        return std::pow(m.number("checkpoint.std_ms").value_or(0), 2) / count;
    };
    auto const difference = *a.number("checkpoint.mean_ms") - *b.number("checkpoint.mean_ms");
    return std::abs(difference) <= 2 * std::sqrt(variance(a) + variance(b));
}

std::string blocked(result_file const& file) {
    auto const* base = file.traditional();
    auto const base_ms = base != nullptr ? base->number("checkpoint.mean_ms") : std::nullopt;
    if (!base_ms || *base_ms <= 0) return {};
    std::vector<std::string> parts;
    for (auto const* method : checkpointing(file)) {
        auto const mean = method->number("checkpoint.mean_ms");
        if (!mean || method == base) continue;
        auto const ratio = *mean / *base_ms;
        auto part = format_number(*mean) + " ms with " + named(*method) + " (" + format_number(ratio, 2) + " of it, " +
                    (ratio <= 1 ? times(1 / std::max(ratio, 1e-9)) + " less" : times(ratio) + " as long");
        parts.push_back(part + (saves_alike(*method, *base) ? ", within the scatter of the saves)" : ")"));
    }
    if (parts.empty()) return {};
    return "A save blocks training for " + format_number(*base_ms) + " ms with " + named(*base) + ", " + joined(parts) + ".";
}

std::string drained_ratio(result_file const& file) {
    auto const* base = file.traditional();
    if (base == nullptr) return {};
    std::vector<std::string> parts;
    for (auto const* method : checkpointing(file)) {
        if (method == base) continue;
        if (auto const verdict = compare(file, *method, *base, "drained_time_sec"))
            parts.push_back(format_number(verdict->ratio) + " with " + named(*method) + interval(*verdict) +
                            (verdict->within_noise ? ", within the noise" : ""));
    }
    return parts.empty() ? std::string() : "Drained time over that of " + named(*base) + ": " + joined(parts) + ".";
}

// What checkpoints add to the loop itself, against what they add with traditional.
std::string loop_added(result_file const& file) {
    auto const *base = file.traditional(), *none = file.none();
    auto const none_sec = none != nullptr ? none->number("loop_time_sec") : std::nullopt;
    auto const base_sec = base != nullptr ? base->number("loop_time_sec") : std::nullopt;
    if (!none_sec || !base_sec || *base_sec <= *none_sec) return {};
    std::vector<std::string> parts;
    for (auto const* method : checkpointing(file)) {
        auto const time = method->number("loop_time_sec");
        if (!time || method == base) continue;
        auto const added = *time - *none_sec;
        auto const verdict = compare(file, *method, *none, "loop_time_sec");
        auto const noise = verdict && verdict->within_noise ? ", within the noise" : "";
        parts.push_back(format_number(added) + " s with " + named(*method) + " (" + format_number(added / (*base_sec - *none_sec), 2) + " of it" +
                        noise + ")");
    }
    if (parts.empty()) return {};
    auto const verdict = compare(file, *base, *none, "loop_time_sec");
    return "Checkpoints add to the training loop " + format_number(*base_sec - *none_sec) + " s with " + named(*base) +
           (verdict && verdict->within_noise ? " (within the noise), " : ", ") + joined(parts) + ".";
}

std::string over_floor(result_file const& file) {
    std::vector<std::string> parts;
    for (auto const* method : checkpointing(file))
        if (auto const ratio = method->number("over_floor")) parts.push_back(format_number(*ratio) + " with " + named(*method));
    if (parts.empty()) return {};
    return "Drained time over the floor (what the disk and the training allow at best): " + joined(parts) + ".";
}

std::string noise_rule(result_file const& file) {
    std::size_t repeats = 1, timed = 0;
    for (auto const& method : file.methods) {
        repeats = std::max(repeats, method.repeats("drained_time_sec").size());
        timed += method.number("drained_time_sec") ? 1 : 0;
    }
    if (timed < 2) return {};
    auto const noise = single_run_noise_percent(file);
    if (repeats < 2)
        return "One run of each method: differences of total times below about " + format_number(noise, noise < 9.5 ? 1 : 2) +
               "% count as noise (twice the scatter of the steps and " +
               "saves in the run, at least 3%; another run may differ by more). --repeat 7 tells more.";
    return "Medians of " + std::to_string(repeats) + " repeats; \"within the noise\" means that the 95% interval of " + "the paired ratios holds 1." +
           (repeats < 7 ? " So few give wide intervals: --repeat 7 tells more." : "");
}

// Things that a reader must not miss: saves that failed or were left out, stalls longer than a step.
std::vector<std::string> notices(result_file const& file) {
    std::vector<std::string> lines;
    for (auto const* method : checkpointing(file)) {
        std::vector<std::string> lost;
        for (auto const* key : {"failed", "skipped", "replaced"})
            if (auto const count = method->number(key); count && *count > 0) lost.push_back(format_number(*count, 9) + " " + key);
        if (!lost.empty()) lines.push_back("**" + named(*method) + ": of its saves " + joined(lost) + ".**");
        auto const longest = method->number("checkpoint.max_ms"), step = method->number("training_step.mean_ms");
        auto const mean = method->number("checkpoint.mean_ms");
        // Where a save as a rule takes longer than a step, the mean has already said so.
        if (longest && step && mean && *step > 0 && *longest > *step && *mean <= *step && *longest > 4 * *mean)
            lines.push_back("The longest stall of " + named(*method) + " was " + format_number(*longest) + " ms, more than a training step (" +
                            format_number(*step) + " ms).");
    }
    return lines;
}

std::string losses(result_group const& group) {
    json const* first = nullptr;
    std::size_t count = 0;
    bool same = true;
    auto look = [&](json const* loss) {
        if (loss == nullptr || !loss->is_number()) return;
        ++count;
        first = first == nullptr ? loss : first;
        same = same && *loss == *first;
    };
    std::vector<std::string> shown;
    for (auto const* file : group.files)
        for (auto const& method : file->methods) {
            auto const* loss = find_value(method.values, "final_loss");
            look(loss);
            auto const* repeats = find_value(method.values, "repeats");
            if (repeats != nullptr && repeats->is_array())
                for (auto const& repeat : *repeats) look(find_value(repeat, "final_loss"));
            if (loss != nullptr && loss->is_number())
                shown.push_back(named(method) + " " + (group.swept() ? file->frequency_words() + " " : "") + loss->dump());
        }
    if (count < 2) return {};
    if (same) return "Every method ends with the same loss, to the bit: " + first->dump() + ".";
    return "**The final losses differ: a method that changes the training is wrong, whatever its speed.** " + joined(shown) + ".";
}

std::string restores(result_group const& group) {
    std::size_t exact = 0;
    std::vector<std::string> broken, unchecked;
    for (auto const* file : group.files)
        for (auto const* method : checkpointing(*file)) {
            auto const name = named(*method) + (group.swept() ? " " + file->frequency_words() : "");
            std::vector<json const*> answers{find_value(method->values, "restore.bit_exact")};
            auto const* repeats = find_value(method->values, "repeats");
            if (repeats != nullptr && repeats->is_array())
                for (auto const& repeat : *repeats) answers.push_back(find_value(repeat, "restore.bit_exact"));
            std::erase_if(answers, [](json const* answer) { return answer == nullptr || !answer->is_boolean(); });
            if (answers.empty())
                unchecked.push_back(name);
            else if (std::all_of(answers.begin(), answers.end(), [](json const* yes) { return yes->get<bool>(); }))
                ++exact;
            else
                broken.push_back(name);
        }
    if (!broken.empty()) return "**Not bit exact after restore: " + joined(broken) + ".**";
    if (exact == 0) return "No restore was checked.";
    auto text = "Every restore was bit exact (" + std::to_string(exact) + " of " + std::to_string(exact) + ").";
    return unchecked.empty() ? text : text + " Not checked: " + joined(unchecked) + ".";
}

// One quantity of each method over the frequencies: "85.2, 85.4, 84.9 ms with ...; ...". Empty where none has it.
std::string over_frequencies(result_group const& group, std::vector<std::string> const& names, std::string const& unit, auto const& cell) {
    std::string text;
    for (auto const& name : names) {
        std::string values;
        bool any = false;
        for (auto const* file : group.files) {
            auto const* method = file->method(name);
            auto const value = method != nullptr ? cell(*file, *method) : std::string();
            any = any || !value.empty();
            values += (values.empty() ? "" : ", ") + (value.empty() ? "–" : value);
        }
        if (any) text += (text.empty() ? "" : "; ") + values + unit + " with " + markdown_text(name);
    }
    return text;
}

// The same findings where only the frequency differs, told once.
std::vector<std::string> sweep(result_group const& group) {
    std::vector<std::string> names, lines;
    std::string frequencies;
    for (auto const* file : group.files) {
        frequencies += (frequencies.empty() ? "" : ", ") + format_number(file->checkpoint_freq().value_or(0), 9);
        for (auto const* method : checkpointing(*file))
            if (std::find(names.begin(), names.end(), method->name) == names.end()) names.push_back(method->name);
    }
    auto const say = [&](std::string const& what, std::string const& values) {
        if (!values.empty()) lines.push_back(what + ": " + values + ".");
    };
    auto const number = [](std::string path) {
        return [path](result_file const&, method_result const& method) {
            auto const value = method.number(path);
            return value ? format_number(*value) : std::string();
        };
    };
    if (names.size() > 1) {
        auto const best = cheapest(*group.files.front());
        auto const always = std::all_of(group.files.begin(), group.files.end(), [&](auto const* file) { return cheapest(*file) == best; });
        std::vector<std::string> parts;
        for (auto const* file : group.files)
            if (auto const here = cheapest(*file); !here.empty())
                parts.push_back(joined(here) + (here.size() > 1 ? " (alike within the noise) " : " ") + file->frequency_words());
        if (always && best.size() == 1)
            lines.push_back("**" + best.front() + " costs least at every frequency.**");
        else
            say("Least cost", joined(parts));
    }
    say("Overhead over training without checkpoints, every " + frequencies + " steps",
        over_frequencies(group, names, "", [](result_file const& file, method_result const& method) {
            auto const overhead = method.number("overhead_vs_none_percent");
            auto const* none = file.none();
            auto const verdict = none != nullptr ? compare(file, method, *none, "drained_time_sec") : std::nullopt;
            return overhead ? percent(*overhead) + (verdict && verdict->within_noise ? " (within the noise)" : "") : std::string();
        }));
    say("A save blocks training, every " + frequencies + " steps, for", over_frequencies(group, names, " ms", number("checkpoint.mean_ms")));
    say("Drained time over that of traditional, every " + frequencies + " steps",
        over_frequencies(group, names, "", [](result_file const& file, method_result const& method) {
            auto const* base = file.traditional();
            if (base == nullptr || base == &method) return std::string();
            auto const verdict = compare(file, method, *base, "drained_time_sec");
            return verdict ? format_number(verdict->ratio) + (verdict->within_noise ? " (within the noise)" : "") : std::string();
        }));
    say("Drained time over the floor, every " + frequencies + " steps", over_frequencies(group, names, "", number("over_floor")));
    return lines;
}

}  // namespace

std::string findings(result_group const& group) {
    std::vector<std::string> lines;
    if (group.swept()) {
        lines = sweep(group);
    } else {
        auto const& file = *group.files.front();
        lines = {least_cost(file), blocked(file), drained_ratio(file), loop_added(file), over_floor(file)};
    }
    for (auto const* file : group.files)
        for (auto const& notice : notices(*file)) lines.push_back(notice + (group.swept() ? " (" + file->frequency_words() + ")" : ""));
    auto const* noisiest = *std::max_element(group.files.begin(), group.files.end(), [](auto const* a, auto const* b) {
        return single_run_noise_percent(*a) < single_run_noise_percent(*b);
    });
    lines.insert(lines.end(), {losses(group), restores(group), noise_rule(*noisiest)});
    std::string text;
    for (auto const& line : lines)
        if (!line.empty()) text += "- " + line + '\n';
    return text;
}

}  // namespace varve::tool::reporting
