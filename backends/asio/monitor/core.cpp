#include "core.hpp"

#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>

#include <unistd.h>
#include <algorithm>
#include <iterator>
#include <thread>

#include "varve/detail/text.hpp"
#include "varve/detail/thread_name.hpp"

#include "session.hpp"
#include "store_path.hpp"
#include "transport/addresses.hpp"

namespace varve::asio::server {

namespace {

constexpr std::size_t most_sessions = 256, most_network_sessions = 192;
/// That a disk may keep waiting before others wait with them.
constexpr std::size_t reads_at_once = 4;
constexpr std::size_t asked_at_once = 2;
/// Beyond which those of runs that are over go.
constexpr std::size_t most_replicas = 64;
/// With `once`: for how long nobody may come before it ends.
constexpr std::chrono::seconds first_trainer_limit{60};
/// Of greetings of more than a buffer that are being read, in all: two of the largest.
constexpr std::uint64_t most_greeting_bytes = 2 * wire::most_hello_bytes;
/// For a connection to end whose process has.
constexpr std::chrono::seconds busy_limit{1};

std::string megabytes(std::uint64_t bytes) { return std::to_string((bytes + 999'999) / 1'000'000) + " MB"; }

}  // namespace

error cannot_go_on(std::exception const& e) {
    return error(std::make_error_code(std::errc::not_enough_memory), std::string("the monitor cannot go on with this connection: ") + e.what());
}

core::core(monitor_options options)
    : options_(std::move(options)), news_(boost::asio::make_strand(context_)), work_(context_.get_executor()), first_trainer_(context_),
      farewell_(context_), budget_(options_.memory_limit_bytes), greetings_(most_greeting_bytes), lingering_(budget_), readers_(reads_at_once),
      askers_(asked_at_once) {}
core::~core() = default;

void core::listen() {
    if (options_.listen.empty()) throw error(std::make_error_code(std::errc::invalid_argument), "a monitor needs an address to listen at");
    if (options_.peer && !options_.peer_tls) {
        auto const found = transport::resolve(*options_.peer, false);
        transport::expect_loopback(*options_.peer, found->ai_addr);
    }
    for (auto const& at : options_.listen) {
        listeners_.push_back(std::make_unique<listener>(context_.get_executor(), at, at.is_unix() ? nullptr : options_.tls));
        where_.push_back(listeners_.back()->where());
    }
    for (std::size_t i = 0; i < listeners_.size(); ++i) accept(i);
    if (!options_.once) return;
    first_trainer_.expires_after(first_trainer_limit);
    first_trainer_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
        if (!ec) self->stop();
    });
}

void core::run() {
    auto serve = [&] {
        for (;;) {
            try {
                context_.run();
                return;
            } catch (std::exception const& e) {
                log(std::string("a connection was lost to an error of the monitor: ") + e.what());
            }
        }
    };
    std::vector<std::jthread> others;
    for (unsigned i = 1; i < options_.threads; ++i)
        others.emplace_back([&] {
            varve::detail::name_this_thread("varve-serve");
            serve();
        });
    serve();
    others.clear();
    readers_.join();
    askers_.join();
}

std::vector<address> core::where() const { return where_; }

void core::accept(std::size_t i) {
    listeners_[i]->accept(boost::asio::make_strand(context_), [self = shared_from_this(), i](std::error_code ec, std::unique_ptr<stream> s) {
        {
            std::lock_guard lock(self->mutex_);
            if (self->stopping_) return;
            // The socket is 0600; this is for whoever changed that.
            bool const stranger = s && s->passes_descriptors() && s->peer_uid() != ::geteuid() && s->peer_uid() != 0;
            // Who comes over the network is not known yet, and leaves room for this host's.
            auto const most = s && s->peer_uid() ? most_sessions : most_network_sessions;
            if (s && !stranger && self->sessions_.size() < most) {
                try {
                    auto const made = std::make_shared<session>(self, std::move(s));
                    self->sessions_.insert(made);
                    made->start();
                } catch (std::exception const&) {
                    ec = std::make_error_code(std::errc::not_enough_memory);
                }
            }
        }
        if (!ec) return self->accept(i);
        // Out of descriptors, as a rule: they come back when somebody leaves.
        auto later = std::make_shared<boost::asio::steady_timer>(self->context_, std::chrono::milliseconds(100));
        later->async_wait([self, i, later](boost::system::error_code cancelled) {
            if (!cancelled) self->accept(i);
        });
    });
}

void core::stop() {
    std::vector<std::shared_ptr<session>> all;
    {
        std::lock_guard lock(mutex_);
        if (std::exchange(stopping_, true)) return;
        all.assign(sessions_.begin(), sessions_.end());
        waiting_.clear();
        for (auto const& [path, image] : lingering_.clear()) tell_if_lost(path, *image);
        first_trainer_.cancel();
        for (auto* asks : asking_) asks->cancel();
        // What a store still commits is sent too.
        for (auto const& [path, copy] : replicas_)
            if (!stores_.contains(path)) copy->finish_within(options_.peer_farewell);
        if (options_.peer) {
            farewell_.expires_after(options_.peer_farewell);
            farewell_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
                if (ec) return;
                std::lock_guard inner(self->mutex_);
                for (auto const& [path, copy] : self->replicas_) copy->cancel();
            });
        }
    }
    for (auto& l : listeners_) l->close();
    for (auto const& s : all) s->end(error(errc::cancelled, "the monitor is ending"));
    look_if_over();
}

void core::ended(session* s) {
    std::vector<waiting> gone;
    decltype(arrived_)::node_type unread;
    {
        std::lock_guard lock(mutex_);
        std::erase_if(sessions_, [&](auto const& other) { return other.get() == s; });
        // What it said, and its pool, would wait for the store, or for the disk.
        auto const from = std::stable_partition(waiting_.begin(), waiting_.end(), [&](auto const& w) { return w.who.call.who != s; });
        std::move(from, waiting_.end(), std::back_inserter(gone));
        waiting_.erase(from, waiting_.end());
        unread = arrived_.extract(s);
    }
    look_if_over();
}

void core::look_if_over() {
    bool stop_now = false;
    {
        std::lock_guard lock(mutex_);
        if (!stores_.empty() || !sessions_.empty()) return;
        if (stopping_) {
            if (std::any_of(replicas_.begin(), replicas_.end(), [](auto const& r) { return !r.second->over(); })) return;
            farewell_.cancel();
            work_.reset();
        } else {
            stop_now = options_.once && had_trainer_ && lingering_.empty();
        }
    }
    if (stop_now) stop();
}

// ---- stores ----

void core::attach(wire::hello hello, std::vector<file_descriptor> regions, bool over_network, attached call) {
    if (hello.purpose == wire::purpose::status) return call.good(nullptr, {});
    look_up({std::move(hello), std::move(regions), over_network, std::move(call)});
}

void core::look_up(arrival a) {
    auto const call = a.call;
    try {
        {
            std::lock_guard lock(mutex_);
            if (!is_there(call.who)) return;
            arrived_.insert_or_assign(call.who, std::move(a));
        }
        read_from_disk([self = shared_from_this(), who = call.who] { self->attach_next(who); });
    } catch (std::exception const& e) {
        call.refused(cannot_go_on(e));
    }
}

/// What it said, and its pool, are gone with its connection, whatever disk it waits for.
void core::attach_next(session const* who) {
    decltype(arrived_)::node_type taken;
    {
        std::lock_guard lock(mutex_);
        taken = arrived_.extract(who);
    }
    if (!taken) return;
    auto const call = taken.mapped().call;
    try {
        auto const path = store_path(options_.dir, taken.mapped().hello.store, taken.mapped().over_network);
        attach_to(path, std::move(taken.mapped()));
    } catch (error const& e) {
        call.refused(e);
    } catch (std::exception const& e) {
        call.refused(cannot_go_on(e));
    }
}

void core::read_from_disk(std::function<void()> call) { start(readers_, std::move(call)); }

void core::start(boost::asio::thread_pool& on, std::function<void()> call) {
    boost::asio::post(on, [this, call = std::move(call)] {
        try {
            call();
        } catch (std::exception const& e) {
            log(std::string("a connection waits in vain, for an error of the monitor: ") + e.what());
        }
    });
}

/// With the mutex held.
bool core::is_there(session const* who) const {
    return std::any_of(sessions_.begin(), sessions_.end(), [&](auto const& s) { return s.get() == who; });
}

/// Throws error where it is refused at once.
void core::attach_to(std::filesystem::path const& path, arrival a) {
    bool const trains = a.hello.purpose == wire::purpose::trainer;
    if (trains) held_store::expect_sense(a.hello);
    std::unique_lock lock(mutex_);
    if (stopping_) throw error(errc::cancelled, "the monitor is ending");
    if (!is_there(a.call.who)) return;
    if (auto it = stores_.find(path); it != stores_.end()) {
        bool const busy = it->second->has_trainer();
        if (!busy || trains) return wait_for_store(path, busy, std::move(a));
    }
    if (trains) return attach_trainer(path, std::move(a.hello), std::move(a.regions), std::move(a.call));
    wire::welcome answer;
    if (auto const* kept = lingering_.find(path)) answer.memory_step = kept->step;
    a.call.good(nullptr, answer);
}

/// With the mutex held. What the last trainer left is being written: then it can be fetched, or added to. Where it is not seen to
/// have gone, its connection gets a moment to end: a killed trainer's may come after the next one's beginning.
void core::wait_for_store(std::filesystem::path const& path, bool busy, arrival a) {
    auto const id = ++last_waiting_;
    auto const call = a.call;
    waiting_.push_back({path, id, std::move(a)});
    if (!busy) return;
    auto timer = std::make_shared<boost::asio::steady_timer>(context_, busy_limit);
    timer->async_wait([weak = weak_from_this(), timer, path, id, call](boost::system::error_code) {
        auto const self = weak.lock();
        if (!self) return;
        {
            std::lock_guard lock(self->mutex_);
            auto it = self->stores_.find(path);
            if (it != self->stores_.end() && !it->second->has_trainer()) return;
            if (std::erase_if(self->waiting_, [&](auto const& w) { return w.id == id; }) == 0) return;
        }
        call.refused(error(errc::store_locked, varve::detail::printable(path.string()) + ": another process is writing to this store"));
    });
}

/// With the mutex held.
void core::attach_trainer(std::filesystem::path const& path, wire::hello hello, std::vector<file_descriptor> descriptors, attached call) {
    auto lease = take_memory(path, hello);
    auto pool = pool_of(hello, std::move(descriptors));

    // The store is in the map before anything of its thread is carried out here, in its order.
    auto in_map = [self = weak_from_this(), path](auto then) {
        if (auto core = self.lock())
            boost::asio::post(core->news_, [core, path, then = std::move(then)]() mutable {
                std::shared_ptr<held_store> store;
                {
                    std::lock_guard lock(core->mutex_);
                    if (auto it = core->stores_.find(path); it != core->stores_.end()) store = it->second;
                }
                then(*core, std::move(store));
            });
    };
    store_hooks hooks;
    hooks.opened = [in_map, path, call, fresh = hello.fresh](opened_store const& found) {
        in_map([path, call, found, fresh](core& in, std::shared_ptr<held_store> store) { in.store_opened(path, store, found, fresh, call); });
    };
    hooks.not_opened = [in_map, path, call](error const& e) {
        in_map([path, call, e](core& in, std::shared_ptr<held_store> store) {
            store.reset();
            in.store_closed(path, nullptr);
            call.refused(e);
        });
    };
    hooks.tell = call.tell;
    hooks.still_there = call.still_there;
    hooks.became_durable = [in_map, path](std::uint64_t step, std::uint64_t sequence) {
        in_map([path, step, sequence](core& in, std::shared_ptr<held_store> const&) {
            std::lock_guard lock(in.mutex_);
            in.lingering_.drop(path);
            if (auto it = in.replicas_.find(path); it != in.replicas_.end()) it->second->offer({step, sequence});
        });
    };
    hooks.more_memory = [self = weak_from_this(), path](std::uint64_t bytes) -> std::optional<memory_budget::lease> {
        auto const core = self.lock();
        if (!core) return std::nullopt;
        std::lock_guard lock(core->mutex_);
        core->lingering_.make_room(path, bytes);
        return core->budget_.take(bytes);
    };
    hooks.ended = [in_map, path, let_go = call.let_go](std::unique_ptr<kept_image> kept) {
        let_go();
        in_map([path, kept = std::move(kept)](core& in, std::shared_ptr<held_store> store) mutable {
            store.reset();
            in.store_closed(path, std::move(kept));
        });
    };
    hooks.log = [self = weak_from_this()](std::string const& line) {
        if (auto core = self.lock()) core->log(line);
    };
    auto store = std::make_shared<held_store>(path, std::move(hello), std::move(pool), std::move(lease), options_.writes_at_once, *options_.calls,
                                              std::move(hooks));
    stores_.emplace(path, std::move(store));
    had_trainer_ = true;
    first_trainer_.cancel();
}

trainer_pool core::pool_of(wire::hello const& hello, std::vector<file_descriptor> descriptors) const {
    if (!hello.device.empty()) {
        if (!options_.device_memory)
            throw error(errc::unsupported, "this monitor has no way to a GPU's memory; take one that was built with CUDA, or pinned staging");
        return {std::move(descriptors), hello.region_bytes, static_cast<std::size_t>(hello.block_bytes), hello.device, options_.device_memory};
    }
    std::vector<shared_region> regions;
    regions.reserve(descriptors.size());
    for (std::size_t i = 0; i < descriptors.size(); ++i) regions.emplace_back(std::move(descriptors[i]), hello.region_bytes[i]);
    return trainer_pool(std::move(regions));
}

memory_budget::lease core::lend_for_greeting(std::uint64_t bytes) {
    auto lease = greetings_.take(bytes);
    if (!lease)
        throw error(std::make_error_code(std::errc::not_enough_memory),
                    "others are sending large greetings to the monitor, which has " + megabytes(greetings_.limit_bytes()) + " for them; try again");
    return std::move(*lease);
}

/// With the mutex held.
memory_budget::lease core::take_memory(std::filesystem::path const& path, wire::hello const& hello) {
    std::uint64_t least = 0, most = 0;
    for (auto bytes : hello.region_bytes) least += bytes;
    bool const on_device = !hello.device.empty();
    if (on_device) least = held_store::device_places_bytes(hello);
    // What keeps the newest of a GPU's pool in host memory may be had later too, or not at all.
    most = on_device ? held_store::device_bytes(hello) : least;
    if (hello.region_bytes.empty()) {
        most = held_store::wanted_bytes(hello);
        least = std::min<std::uint64_t>(most, 2 * hello.block_bytes);
    }
    // Blocks that come as payload may have less; what sends copies to the peer has its memory beside them.
    auto const beside = options_.peer && !hello.relayed ? replica::memory_bytes : 0;
    lingering_.make_room(path, (on_device ? least : most) + beside);
    auto const free = budget_.free_bytes();
    auto lease = budget_.take(std::clamp(free - std::min(beside, free), least, most));
    if (!lease)
        throw error(std::make_error_code(std::errc::not_enough_memory),
                    (on_device ? "blocks on their way out of the trainer's GPU take " : "the trainer's pool of ") + megabytes(least) +
                        (on_device ? ", " : " is ") + "more than the monitor may hold: " + megabytes(budget_.limit_bytes()) + ", of which " +
                        megabytes(budget_.used_bytes()) + " are in use; raise --memory-mb or take a smaller pool");
    // Half an image is of no use.
    if (on_device && lease->bytes() < most) lease->shrink(least);
    return std::move(*lease);
}

void core::store_opened(std::filesystem::path const& path, std::shared_ptr<held_store> const& store, opened_store const& found, bool fresh,
                        attached const& call) {
    if (!store) return;
    wire::welcome w;
    w.durable_step = found.durable_step;
    w.durable_sequence = found.durable_sequence;
    w.credit_bytes = found.credit_bytes;
    std::string no_copy;
    {
        std::lock_guard lock(mutex_);
        // Not before: one that is refused changes nothing.
        if (fresh) lingering_.drop(path);
        lingering_.drop_older(path, found.durable_sequence);
        if (auto const* kept = lingering_.find(path)) w.memory_step = kept->step;
        try {
            if (options_.peer && !store->trained().relayed) replicate(path, store->trained(), found);
        } catch (std::exception const& e) {
            no_copy = e.what();
        }
    }
    if (!no_copy.empty()) log(path.string() + ": nothing is sent to the peer: " + no_copy);
    log(path.string() + ": opened for " + call.peer);
    call.good(store, w);
}

/// With the mutex held.
void core::replicate(std::filesystem::path const& path, wire::hello const& run, opened_store const& found) {
    replica_settings s;
    s.peer = *options_.peer;
    s.tls = options_.peer_tls;
    s.retry_every = options_.peer_retry;
    s.store = path;
    s.run = run;
    // The core outlives its replicas.
    s.memory = [this, path] {
        std::lock_guard lock(mutex_);
        lingering_.make_room(path, replica::memory_bytes);
        return budget_.take(replica::memory_bytes);
    };
    s.log = [this](std::string const& line) { log(line); };
    s.ended = [this, weak = weak_from_this()] {
        boost::asio::post(context_, [weak] {
            if (auto const self = weak.lock()) self->look_if_over();
        });
    };
    // What is over stays for the status; of many stores, not for ever.
    for (auto it = replicas_.begin(); it != replicas_.end() && replicas_.size() >= most_replicas;)
        it = it->first != path && it->second->over() ? replicas_.erase(it) : std::next(it);
    std::optional<local_checkpoint> newest;
    if (found.durable_step > 0) newest = {found.durable_step, found.durable_sequence};
    auto& copy = replicas_[path];
    if (copy) copy->cancel();
    auto before = std::move(copy);
    try {
        copy = std::make_shared<replica>(std::move(s), newest, before);
    } catch (...) {
        replicas_.erase(path);
        // Its thread may wait for the mutex, and is waited for.
        boost::asio::post(context_, [before = std::move(before)] {});
        throw;
    }
}

void core::detach(std::shared_ptr<held_store> const& store, bool farewell) {
    bool keep = false;
    {
        std::lock_guard lock(mutex_);
        keep = !stopping_ && options_.linger.count() > 0 && !(options_.once && farewell);
    }
    store->trainer_gone(keep);
}

/// Of an image whose time is over.
void core::tell_if_lost(std::filesystem::path const& path, kept_image const& image) const {
    if (!image.durable) log(path.string() + ": the checkpoint of step " + std::to_string(image.step) + ", which the disk did not take, is lost");
}

void core::store_closed(std::filesystem::path const& path, std::unique_ptr<kept_image> kept) {
    std::shared_ptr<held_store> gone;
    std::vector<arrival> again;
    {
        std::lock_guard lock(mutex_);
        if (auto it = stores_.find(path); it != stores_.end()) {
            gone = std::move(it->second);
            stores_.erase(it);
        }
        if (auto it = replicas_.find(path); it != replicas_.end()) {
            if (stopping_)
                it->second->finish_within(options_.peer_farewell);
            else
                it->second->finish();
        }
        if (kept && stopping_) tell_if_lost(path, *kept);
        if (kept && !stopping_) {
            log(path.string() + ": the checkpoint of step " + std::to_string(kept->step) + " lingers in memory");
            auto timer = lingering_.keep(path, std::move(kept), context_, options_.linger);
            timer->async_wait([weak = weak_from_this(), path, timer](boost::system::error_code ec) {
                auto const self = weak.lock();
                if (ec || !self) return;
                std::unique_ptr<kept_image> image;
                {
                    std::lock_guard inner(self->mutex_);
                    image = self->lingering_.end(path, timer);
                }
                if (!image) return;
                self->tell_if_lost(path, *image);
                self->look_if_over();
            });
        }
        std::erase_if(waiting_, [&](auto& w) {
            if (w.path != path) return false;
            again.push_back(std::move(w.who));
            return true;
        });
    }
    // Its thread has nothing left to do, and is waited for here.
    gone.reset();
    for (auto& a : again) look_up(std::move(a));
    look_if_over();
}

}  // namespace varve::asio::server
