#include "monitor_process.hpp"

#include <boost/asio/io_context.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "varve/asio/transport.hpp"
#include "varve/detail/digest.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/error.hpp"

#include "errors.hpp"

namespace varve::tool {

namespace {

using clock = std::chrono::steady_clock;

constexpr std::chrono::seconds start_limit{20};
/// A monitor ends by itself when it has committed what is crash-safe.
constexpr std::chrono::seconds end_limit{120};
constexpr std::chrono::milliseconds look_every{5};
constexpr int ready_descriptor = 3;

std::string digest_of(std::string const& text) { return detail::hex(detail::digest(std::as_bytes(std::span(text)))); }

/// A folder that is ours alone, for sockets: the user's runtime folder, or one below /tmp.
std::filesystem::path socket_folder(bool& made_here) {
    auto is_ours = [](char const* path) {
        struct stat info{};
        return ::lstat(path, &info) == 0 && S_ISDIR(info.st_mode) && info.st_uid == ::geteuid() && (info.st_mode & 077) == 0;
    };
    made_here = false;
    if (char const* given = std::getenv("XDG_RUNTIME_DIR"); given && is_ours(given)) return given;
    auto const path = "/tmp/varve-" + std::to_string(::geteuid());
    if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST)
        throw_if(last_system_error(errno), path + ": cannot make a folder for the monitor's socket");
    if (!is_ours(path.c_str()))
        throw error(std::make_error_code(std::errc::permission_denied),
                    path + ": not ours alone, so the monitor's socket cannot be there; set XDG_RUNTIME_DIR");
    made_here = true;
    return path;
}

[[noreturn]] void become_monitor(int ready, std::vector<char*> const& argv) noexcept {
    ::setsid();
    int const null = ::open("/dev/null", O_RDWR);
    for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(null, fd);
    // dup2 onto itself would leave the descriptor marked to close at exec.
    if (ready == ready_descriptor)
        ::fcntl(ready, F_SETFD, 0);
    else
        ::dup2(ready, ready_descriptor);
    sigset_t none;
    ::sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::execv("/proc/self/exe", argv.data());
    ::_exit(127);
}

}  // namespace

class monitor_of_run::impl {
public:
    impl(settings const& s, std::filesystem::path const& store, std::uint64_t linger_seconds, std::function<void(std::string const&)> say,
         std::string const& name)
        : linger_seconds_(linger_seconds), say_(std::move(say)), store_(detail::absolute_folder(store)) {
        use_ = std::make_shared<monitor_use>();
        external_ = !s.run.monitor.empty();
        if (external_) {
            use_->certificate = s.run.cert;
            use_->key = s.run.key;
            use_->authority = s.run.ca;
            where_ = asio::parse_address(s.run.monitor);
        } else {
            auto const folder = socket_folder(made_folder_);
            where_.path = folder / (digest_of(std::filesystem::weakly_canonical(store_).string()) + ".sock");
            more_words_ = {"--num-threads", std::to_string(s.pccheck.num_threads)};
            if (!s.run.peer.empty()) more_words_.insert(more_words_.end(), {"--peer", s.run.peer});
            for (auto const& [option, value] : {std::pair("--cert", s.run.cert), std::pair("--key", s.run.key), std::pair("--ca", s.run.ca)})
                if (!value.empty()) more_words_.insert(more_words_.end(), {option, value});
        }
        use_->address = where_.is_unix() ? "unix:" + std::filesystem::absolute(where_.path).string() : where_.text();
        use_->store = where_.is_unix() ? store_.string() : name.empty() ? store_.filename().string() : name;
    }

    void ensure() {
        std::lock_guard lock(mutex_);
        auto const before = child_;
        reap(false);
        if (is_there()) {
            if (child_ <= 0 && !found_) say_("a monitor is there already: it serves");
            found_ = child_ <= 0;
            return;
        }
        // A save that was on its way says so too, where there was one.
        if (before > 0) say_("the monitor, process " + std::to_string(before) + ", is lost");
        if (found_) say_("the monitor is lost");
        found_ = false;
        try {
            start();
        } catch (error const&) {
            // Another run's start may have been under way.
            if (!is_there()) throw;
            found_ = true;
            say_("a monitor is there already: it serves");
            return;
        }
        say_("monitor started, process " + std::to_string(child_));
    }

    void end() noexcept {
        std::lock_guard lock(mutex_);
        if (external_ || over_) return;
        over_ = true;
        if (!method_started_) {
            found_ = false;
            if (child_ > 0) ::kill(child_, SIGTERM);
        }
        // Our goodbye was its last word; what is crash-safe is committed first.
        wait_until([this] { return child_ <= 0 && (!found_ || !is_there()); });
        // A second SIGTERM would end it whatever it holds.
        if (child_ > 0 && method_started_) {
            ::kill(child_, SIGTERM);
            wait_until([this] { return child_ <= 0; });
            if (child_ > 0) say_("the monitor, process " + std::to_string(child_) + ", is still at work and is left to it");
        }
        if (made_folder_) ::rmdir(where_.path.parent_path().c_str());  // others' sockets keep it
    }

    /// Another run of this store came first: what was started here is that one's now, and ends with it.
    void let_go() noexcept {
        std::lock_guard lock(mutex_);
        child_ = -1;
    }

    std::shared_ptr<monitor_use> use_;
    bool external_ = false;
    bool method_started_ = false;

private:
    bool is_there() const noexcept try {
        boost::asio::io_context context;
        asio::connect(context.get_executor(), where_, nullptr, std::chrono::seconds(2));
        return true;
    } catch (std::exception const&) {
        return false;
    }

    void reap(bool wait) noexcept {
        if (child_ <= 0) return;
        int status = 0;
        pid_t ended = 0;
        while ((ended = ::waitpid(child_, &status, wait ? 0 : WNOHANG)) < 0 && errno == EINTR) {
        }
        if (ended != 0) child_ = -1;
    }

    /// For the end of what may have a lot to commit.
    template <class Over>
    void wait_until(Over over) noexcept {
        for (auto const until = clock::now() + end_limit; clock::now() < until; std::this_thread::sleep_for(look_every)) {
            reap(false);
            if (over()) return;
        }
    }

    void start() {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC) != 0) throw_if(last_system_error(errno), "cannot start a monitor");
        file_descriptor reader(ends[0], system_calls::kernel()), writer(ends[1], system_calls::kernel());
        std::vector<std::string> words{"varve",
                                       "monitor",
                                       "--dir",
                                       store_.parent_path().string(),
                                       "--unix",
                                       where_.path.string(),
                                       "--once",
                                       "--linger",
                                       std::to_string(linger_seconds_),
                                       "--ready-fd",
                                       std::to_string(ready_descriptor)};
        words.insert(words.end(), more_words_.begin(), more_words_.end());
        std::vector<char*> argv;
        for (auto& w : words) argv.push_back(w.data());
        argv.push_back(nullptr);
        child_ = ::fork();
        if (child_ < 0) throw_if(last_system_error(errno), "cannot start a monitor");
        if (child_ == 0) become_monitor(writer.get(), argv);
        writer.reset();
        std::string line;
        for (auto const until = clock::now() + start_limit; line.find('\n') == std::string::npos;) {
            auto const left = std::chrono::ceil<std::chrono::milliseconds>(until - clock::now()).count();
            pollfd wait{reader.get(), POLLIN, 0};
            int const ready = left > 0 ? ::poll(&wait, 1, static_cast<int>(left)) : 0;
            if (ready < 0 && errno == EINTR) continue;
            char buffer[512];
            auto const n = ready > 0 ? ::read(reader.get(), buffer, sizeof buffer) : 0;
            if (n <= 0) break;
            line.append(buffer, static_cast<std::size_t>(n));
        }
        if (line == "ready\n") return;
        ::kill(child_, SIGKILL);
        reap(true);
        throw error(errc::monitor_lost, "no monitor can be started: " + (line.empty() ? "it does not say why" : line.substr(0, line.find('\n'))));
    }

    std::uint64_t const linger_seconds_;
    std::function<void(std::string const&)> say_;
    std::filesystem::path const store_;
    asio::address where_;
    std::vector<std::string> more_words_;  ///< for one that is started
    bool made_folder_ = false;
    std::mutex mutex_;
    pid_t child_ = -1;
    bool found_ = false;  ///< one that is not our child serves
    bool over_ = false;
};

monitor_of_run::monitor_of_run(settings const& s, std::filesystem::path const& store, std::uint64_t linger_seconds,
                               std::function<void(std::string const&)> say, std::string const& name)
    : impl_(std::make_shared<impl>(s, store, linger_seconds, std::move(say), name)) {
    if (impl_->external_) return;
    impl_->ensure();
    // Kept by its address alone: the use is the impl's own.
    impl_->use_->respawn = [weak = std::weak_ptr(impl_)] {
        if (auto const self = weak.lock()) self->ensure();
    };
}
monitor_of_run::~monitor_of_run() { end(); }
std::string monitor_of_run::name_of_its_own(std::filesystem::path const& store) {
    char host[256] = {};
    ::gethostname(host, sizeof host - 1);
    auto const folder = detail::absolute_folder(store);
    return folder.filename().string() + "-" + digest_of(std::string(host) + "\n" + folder.string());
}
std::unique_ptr<running_method> monitor_of_run::start(method_entry const& entry, libtorch::training_state& training, method_settings s) {
    s.monitor = impl_->use_;
    try {
        auto method = entry.start(training, std::move(s));
        impl_->method_started_ = true;
        return method;
    } catch (error const& e) {
        if (e.code() == errc::store_locked) impl_->let_go();
        throw;
    }
}
bool monitor_of_run::is_over_tcp() const { return impl_->use_->address.starts_with("tcp:"); }
bool monitor_of_run::is_external() const { return impl_->external_; }
void monitor_of_run::end() { impl_->end(); }

}  // namespace varve::tool
