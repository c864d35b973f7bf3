#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "varve/checkpointer_options.hpp"
#include "varve/concepts/format.hpp"
#include "varve/concepts/relaying_sink.hpp"
#include "varve/concepts/scheduling.hpp"
#include "varve/concepts/sink.hpp"
#include "varve/concepts/staging.hpp"
#include "varve/detail/fetch_restore.hpp"
#include "varve/detail/pipeline.hpp"
#include "varve/detail/stream_saver.hpp"
#include "varve/error.hpp"
#include "varve/format/safetensors.hpp"
#include "varve/state.hpp"
#include "varve/store.hpp"
#include "varve/ticket.hpp"

namespace varve {

/// A checkpoint strategy, put together from policies. One loop serves all of them:
///
///     ck.begin(step);                  // on a step with a save due: it stands for the state after this step's update
///     for (layer : layers) {
///         ck.before_update(layer);     // every step, every layer: nothing that still reads it may be overtaken
///         update(layer);
///         ck.layer_ready(layer);
///     }
///     ticket t = ck.seal(metadata);    // takes the layers that were not announced
///
/// with before_update() for all layers at once, and save(step) after a plain update as begin + all layers + seal. No
/// checkpoint mixes two steps. All but request_save is called by one thread, the training's. Layers leave in the order
/// in which the state lists them; one that is announced ahead of an earlier one waits for it.
template <staging Staging, scheduling Scheduling, sink Sink, format Format = safetensors>
class checkpointer {
    static_assert(Sink::accepts(Staging::memory), "varve: this sink does not take memory of this staging's kind");
    static_assert(Staging::memory != memory_kind::device || digesting_staging<Staging>,
                  "varve: a staging in GPU memory must hash its buffers itself (see digesting_staging)");
    static_assert(fixed_layout_format<Format> || !Scheduling::needs_fixed_layout,
                  "varve: this scheduling needs a format with a fixed layout; use varve::sync, or another format");
    static_assert(fixed_layout_format<Format> || !relaying_sink<Sink>, "varve: a relaying sink needs a format with a fixed layout");

public:
    using order_type = typename Staging::order_type;
    static constexpr bool streams = !fixed_layout_format<Format>;
    /// Whether seal waits for more than its own bookkeeping.
    static constexpr bool waits_at_seal = streams || Scheduling::waits != seal_wait::nothing;

    /// For sinks without files. `s`, and whatever the observers refer to, outlives it. Throws what a relaying sink's introduce throws.
    checkpointer(state& s, Staging staging, Scheduling scheduling, Sink sink, checkpointer_options options = {}, Format format = Format{})
        requires(!file_sink<Sink>)
        : checkpointer(s, std::move(staging), scheduling, std::move(sink), std::move(options), std::move(format), nullptr, true) {}

    /// For sinks that write files: opens the store at `folder` first; see store for what it throws. The slots in flight follow from
    /// the scheduling. Throws errc::unsupported for files that are not durable, but for a format that streams.
    checkpointer(state& s, Staging staging, Scheduling scheduling, Sink sink, std::filesystem::path const& folder, store_options files = {},
                 checkpointer_options options = {}, Format format = Format{})
        requires(file_sink<Sink>)
        : checkpointer(s, std::move(staging), scheduling, std::move(sink), std::move(options), std::move(format), &folder, files.durable, files) {}

    checkpointer(checkpointer const&) = delete;
    checkpointer& operator=(checkpointer const&) = delete;
    /// Drains for at most checkpointer_options::drain_on_destroy, fails the rest with errc::cancelled, and waits for the
    /// writes that the sink has taken. Does not throw.
    ~checkpointer() = default;

    /// Starts the save of `step`, the count of updates done once this step's update is, at least 1. With N saves in
    /// flight it blocks, skips or replaces, as the options say; a skipped save's loop is run all the same and does
    /// nothing. Throws errc::out_of_order within a save, and std::errc::invalid_argument for a step that no file name can have.
    ticket begin(std::uint64_t step) {
        timed inside(stalls_.total_ns);
        if (current_) throw error(errc::out_of_order, "begin: the save of step " + std::to_string(current_->step()) + " is not sealed");
        if (step == 0 || step > detail::last_step)
            throw error(std::make_error_code(std::errc::invalid_argument), "begin: steps count from 1 to " + std::to_string(detail::last_step));
        if constexpr (!streams) {
            if (pipeline_->in_flight() >= in_flight_ && !make_room()) {
                current_ = std::make_shared<detail::ticket_state>(step);
                current_->fail(errc::skipped);
                observers_.on({.what = milestone::skipped, .step = step, .error = errc::skipped});
                return ticket(current_);
            }
            requested_ = false;
            job_ = pipeline_->begin(step);
            current_ = job_->ticket;
        } else {
            requested_ = false;
            announced_.assign(state_.layers.size(), false);
            current_ = std::make_shared<detail::ticket_state>(step);
            observers_.on({.what = milestone::begin, .step = step});
        }
        return ticket(current_);
    }

    /// Returns when layer `layer` may be updated by work in `order`: on a host when no copy reads it, on a GPU when the
    /// stream waits for those that do. Throws errc::out_of_order for a layer that the save under way has announced, and what a
    /// staging says that cannot have the stream wait (errc::unsupported while it is captured): nothing may be updated then.
    void before_update(std::size_t layer, order_type order = {}) { before_update_of(layer, layer + 1, order); }

    /// The same for layers [first, last), and for all of them: cheaper than one call a layer.
    void before_update_of(std::size_t first, std::size_t last, order_type order = {}) {
        timed inside(stalls_.total_ns);
        auto const layers = layers_from(first, last);
        refuse_if_announced(layers, "before_update");
        wait_for_copies(layers, order);
    }
    void before_update_all(order_type order) { before_update_of(0, state_.layers.size(), order); }
    void before_update() { before_update_all({}); }

    /// The layer's update is done, or is in `order`; a layerwise save copies it from now on. Nothing outside of a save.
    /// Throws errc::state_changed where the layer's tensors are no longer what the state says: the save fails with it.
    void layer_ready(std::size_t layer, order_type order = {}) { layers_ready(layer, layer + 1, order); }
    /// The same for layers [first, last), whose updates were one: they become one point of `order`'s work.
    void layers_ready(std::size_t first, std::size_t last, order_type order = {}) {
        timed inside(stalls_.total_ns);
        if (!current_) return;
        auto const layers = layers_from(first, last);
        refuse_if_announced(layers, "layer_ready");
        announce(layers, order);
    }

    /// Ends the save: announces the layers that were not, adds the metadata, and waits for what the scheduling says.
    /// Throws errc::out_of_order outside of a save, and errc::state_changed as layer_ready does. Other errors of the save are
    /// the ticket's.
    ticket seal(metadata_map metadata = {}, order_type order = {}) {
        timed inside(stalls_.total_ns);
        if (!current_) throw error(errc::out_of_order, "seal: no save was begun");
        auto outcome = std::exchange(current_, nullptr);
        ticket result(outcome);
        if constexpr (streams) {
            try {
                for (auto l : all_layers_)
                    if (!announced_[l]) bring_up_to_date(l);
            } catch (...) {
                outcome->fail(errc::state_changed);
                throw;
            }
            outcome->seal();
            streamer_->save(*outcome, std::move(metadata));
        } else {
            auto job = std::exchange(job_, nullptr);
            if (!job) return result;
            try {
                rest_.clear();
                for (auto l : all_layers_)
                    if (!pipeline_->is_announced(*job, l)) rest_.push_back(l);
                announce_to(job, rest_, order);
                if (auto ec = metadata_error(metadata)) pipeline_->abandon(job, ec);
            } catch (error const& e) {
                pipeline_->abandon(job, e.code());
                pipeline_->seal(*job, {});
                throw;
            } catch (...) {
                // A hook has thrown: the save is lost, and the ones behind it are not to wait for it.
                pipeline_->abandon(job, errc::state_changed);
                pipeline_->seal(*job, {});
                throw;
            }
            pipeline_->seal(*job, std::move(metadata));
            timed waiting(stalls_.wait_ns);
            if constexpr (Scheduling::waits == seal_wait::durable) pipeline_->wait_until_durable(result);
            if constexpr (Scheduling::waits == seal_wait::staged) result.staged().wait();
        }
        return result;
    }

    /// begin, all layers, seal: the state as it is now, after an update that before_update() preceded.
    ticket save(std::uint64_t step, metadata_map metadata = {}, order_type order = {}) {
        begin(step);
        return seal(std::move(metadata), order);
    }

    /// Asks for a save at the next step; safe in a signal handler and on any thread.
    void request_save() noexcept { requested_ = true; }
    /// Whether a save was asked for since the last begin.
    bool save_requested() const noexcept { return requested_; }

    /// Waits until every sealed save is durable or has failed.
    void drain() {
        if constexpr (!streams) pipeline_->drain();
    }

    /// Reads the newest whole checkpoint, or that of `step`, into the state; nothing if there is none. Waits first until
    /// no save reads the state, and for the work in `order`. Throws as store::restore and seal do.
    std::optional<restored_checkpoint> restore(std::optional<std::uint64_t> step = {}, restore_options options = {},
                                               [[maybe_unused]] order_type order = {})
        requires(file_sink<Sink> || fetching_sink<Sink>)
    {
        if (current_) throw error(errc::out_of_order, "restore: the save of step " + std::to_string(current_->step()) + " is not sealed");
        drain();
        for (auto l : all_layers_) expect_same(l, state_.recheck_to_restore ? state_.recheck_to_restore : state_.recheck);
        // What is not restored is handed back as it is now, not as it was at the last save.
        if (options.model_only && state_.refresh)
            for (auto l : all_layers_) state_.refresh(l);
        std::unique_ptr<device_memory> device;
        if constexpr (reaching_staging<Staging>) {
            if (!options.device && state_.in_device_memory()) device = staging_.reach(order);
            if (device) options.device = device.get();
        }
        std::optional<restored_checkpoint> restored;
        if constexpr (file_sink<Sink>)
            restored = store_->restore(state_, step, options);
        else
            restored = detail::restore_fetched(sink_, format_, state_, step, options);
        if (restored) observers_.on({.what = milestone::restored, .step = restored->step, .bytes = image_bytes()});
        return restored;
    }

    stall_times stalls() const noexcept {
        auto so_far = stalls_;
        if constexpr (wait_measuring_staging<Staging>) so_far.gpu_wait_ns = staging_.gpu_wait_ns();
        return so_far;
    }
    /// N in effect: no more than the pool or the snapshots hold images of, at least 1.
    std::size_t max_in_flight() const noexcept { return in_flight_; }
    /// Bytes of one checkpoint; for a format that streams, of its tensors.
    std::uint64_t image_bytes() const noexcept { return image_bytes_; }
    std::size_t block_bytes() const noexcept { return staging_.block_bytes(); }
    std::size_t pool_bytes() const noexcept { return streams ? 0 : staging_.block_bytes() * staging_.block_count(); }
    std::string describe_sink() const { return sink_.describe(); }
    Staging const& staging() const noexcept { return staging_; }

    varve::store& files() noexcept
        requires(file_sink<Sink>)
    {
        return *store_;
    }

private:
    using clock = std::chrono::steady_clock;

    /// Adds the time of its life to a counter.
    class timed {
    public:
        explicit timed(std::int64_t& to) noexcept : to_(to), since_(clock::now()) {}
        ~timed() { to_ += std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - since_).count(); }

    private:
        std::int64_t& to_;
        clock::time_point since_;
    };

    checkpointer(state& s, Staging staging, Scheduling scheduling, Sink sink, checkpointer_options options, Format format,
                 std::filesystem::path const* folder, bool durable, store_options files = {})
        : state_(s), staging_(std::move(staging)), sink_(std::move(sink)), format_(std::move(format)), observers_(options.observers),
          busy_(options.busy), image_bytes_(s.size_bytes()), all_layers_(s.layers.size()) {
        std::iota(all_layers_.begin(), all_layers_.end(), std::size_t{0});
        if (!streams && !durable) throw error(errc::unsupported, "store_options::durable: only a format that streams saves without syncing");
        if constexpr (!streams) {
            auto layout = format_.lay_out(s);
            image_bytes_ = layout.size_bytes;
            auto blocks_per_image = std::max<std::uint64_t>(1, (layout.size_bytes + staging_.block_bytes() - 1) / staging_.block_bytes());
            std::size_t held = staging_.block_count() / blocks_per_image;
            if constexpr (snapshotting_staging<Staging> && Scheduling::waits == seal_wait::nothing)
                held = std::max(held, staging_.prepare_snapshots(layout, s, scheduling.max_in_flight()));
            in_flight_ = std::clamp<std::size_t>(held, 1, scheduling.max_in_flight());
        }
        if (folder) {
            files.in_flight = in_flight_;
            store_.emplace(*folder, format_, s, streams ? 0 : image_bytes_, std::move(files));
        }
        if constexpr (streams)
            streamer_.emplace(s, sink_, format_, store_ ? &*store_ : nullptr, durable, options.observers);
        else
            pipeline_.emplace(s, staging_, sink_, format_, store_ ? &*store_ : nullptr, Scheduling::copies, options, in_flight_);
    }

    /// True once fewer than N saves are in flight.
    bool make_room() {
        timed waiting(stalls_.wait_ns);
        if (busy_ == when_busy::skip || (busy_ == when_busy::replace && !pipeline_->replace_newest())) return false;
        pipeline_->wait_for_room(in_flight_);
        return true;
    }

    std::span<std::size_t const> layers_from(std::size_t first, std::size_t last) const {
        return std::span(all_layers_).subspan(first, last - first);
    }

    void wait_for_copies(std::span<std::size_t const> layers, order_type order) {
        if constexpr (!streams) {
            if (!pipeline_->busy(layers)) return;
            timed waiting(stalls_.wait_ns);
            if (auto const refused = pipeline_->before_update(layers, order))
                throw error(refused->error, "before_update of layer " + state_.layers[refused->layer].name + ": " + refused->error.message());
        }
    }

    bool is_announced(std::size_t layer) const {
        if constexpr (streams)
            return current_ && announced_[layer];
        else
            return job_ && pipeline_->is_announced(*job_, layer);
    }

    void refuse_if_announced(std::span<std::size_t const> layers, char const* call) const {
        for (auto layer : layers)
            if (is_announced(layer))
                throw error(errc::out_of_order, std::string(call) + ": layer " + state_.layers[layer].name +
                                                    " was announced already in the save of step " + std::to_string(current_->step()));
    }

    void announce(std::span<std::size_t const> layers, order_type order) {
        if constexpr (streams) {
            for (auto layer : layers) {
                bring_up_to_date(layer);
                announced_[layer] = true;
            }
        } else if (job_) {
            try {
                announce_to(job_, layers, order);
            } catch (error const& e) {
                pipeline_->abandon(job_, e.code());
                throw;
            }
        }
    }

    void expect_same(std::size_t layer, std::function<std::error_code(std::size_t)> const& ask) const {
        if (auto const ec = ask ? ask(layer) : std::error_code()) throw error(ec, "layer " + state_.layers[layer].name + ": " + ec.message());
    }
    /// What a layer's tensors mirror goes into them, if they are still what the state says.
    void bring_up_to_date(std::size_t layer) {
        expect_same(layer, state_.recheck);
        if (state_.refresh) state_.refresh(layer);
    }

    template <class Job>
    void announce_to(Job const& job, std::span<std::size_t const> layers, order_type order) {
        // Who announces a layer without before_update has not updated it, but the hook may: an earlier save comes first.
        if (pipeline_->busy(layers)) {
            timed waiting(stalls_.wait_ns);
            if (auto const refused = pipeline_->order_behind(layers, order)) return void(pipeline_->abandon(job, refused->error));
        }
        for (auto layer : layers) bring_up_to_date(layer);
        pipeline_->announce(*job, layers, order);
    }

    /// Whether the header would be refused for its metadata; known at seal, before a sync or async save writes a byte.
    std::error_code metadata_error(metadata_map const& metadata) const {
        try {
            format_.expect_fits(metadata);
        } catch (error const& e) {
            return e.code();
        }
        return {};
    }

    struct nothing {
        template <class... Args>
        void emplace(Args&&...) {}
    };
    struct no_pipeline {
        struct job_type {};
        using job_ptr = std::shared_ptr<job_type>;
    };
    template <class F>
    struct engine_of {
        using pipeline = no_pipeline;
        using streamer = detail::stream_saver<Sink, F>;
    };
    template <fixed_layout_format F>
    struct engine_of<F> {
        using pipeline = detail::pipeline<Staging, Sink, F>;
        using streamer = nothing;
    };
    using pipeline_type = typename engine_of<Format>::pipeline;

    state& state_;
    Staging staging_;
    Sink sink_;
    Format format_;
    observer_list observers_;
    when_busy busy_;
    std::uint64_t image_bytes_;
    std::vector<std::size_t> all_layers_;  ///< 0, 1, 2, ...
    std::vector<std::size_t> rest_;        ///< scratch; allocations cost the training thread, see detail::save_line::spare
    std::size_t in_flight_ = 1;
    stall_times stalls_;
    std::atomic<bool> requested_{false};
    std::shared_ptr<detail::ticket_state> current_;  ///< of the save between begin and seal
    typename pipeline_type::job_ptr job_;            ///< empty for one that was skipped, or that streams
    std::vector<bool> announced_;                    ///< for formats that stream
    std::optional<store> store_;
    std::optional<typename engine_of<Format>::streamer> streamer_;
    std::optional<pipeline_type> pipeline_;  ///< last: its threads use all of the above
};

}  // namespace varve
