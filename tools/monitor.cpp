#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <ostream>
#include <thread>

#include <nlohmann/json.hpp>

#include "varve/asio/monitor/monitor.hpp"
#include "varve/detail/store_folder.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"

#include "command_line.hpp"
#include "commands.hpp"
#include "gpu_reader.hpp"
#include "machine.hpp"
#include "monitor_status.hpp"
#include "signals.hpp"

namespace varve::tool {

namespace {

namespace po = boost::program_options;

/// One datagram to whoever started us as a service; nothing where nobody did. Source: sd_notify(3).
void notify(std::string const& text) {
    char const* where = std::getenv("NOTIFY_SOCKET");
    if (!where || (where[0] != '/' && where[0] != '@')) return;
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    auto const length = std::strlen(where);
    if (length >= sizeof to.sun_path) return;
    std::memcpy(to.sun_path, where, length);
    if (to.sun_path[0] == '@') to.sun_path[0] = '\0';
    file_descriptor fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), system_calls::kernel());
    // Nobody that listens is no reason not to work.
    auto const sent = ::sendto(fd.get(), text.data(), text.size(), MSG_NOSIGNAL, reinterpret_cast<sockaddr const*>(&to),
                               static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length));
    static_cast<void>(sent);
}

std::uint64_t number(po::variables_map const& values, char const* name, std::uint64_t most) {
    auto const& text = values[name].as<std::string>();
    std::uint64_t value = 0;
    auto const [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (code != std::errc() || end != text.data() + text.size() || value > most)
        throw usage_error("--" + std::string(name) + " '" + text + "': must be a whole number from 0 to " + std::to_string(most));
    return value;
}

std::vector<asio::address> addresses(po::variables_map const& values) {
    std::vector<asio::address> out;
    try {
        if (values.count("unix")) out.push_back(asio::parse_address("unix:" + values["unix"].as<std::string>()));
        if (values.count("tcp")) out.push_back(asio::parse_address("tcp:" + values["tcp"].as<std::string>()));
    } catch (error const& e) {
        throw usage_error(e.what());
    }
    if (out.empty()) throw usage_error("no address given: say where to listen, --unix PATH or --tcp HOST:PORT");
    return out;
}

std::shared_ptr<asio::tls_context const> tls_of(po::variables_map const& values, bool server) {
    auto const given = values.count("cert") + values.count("key") + values.count("ca");
    if (given == 0) return nullptr;
    if (given < 3) throw usage_error("--cert, --key and --ca go together: TLS shows a certificate on both sides");
    return load_monitor_tls(values["cert"].as<std::string>(), values["key"].as<std::string>(), values["ca"].as<std::string>(), server);
}

/// Lets the monitor end on SIGINT and SIGTERM, which are blocked in every thread and read here.
class ending_signals {
public:
    ending_signals() {
        ::sigemptyset(&set_);
        for (int s : {SIGINT, SIGTERM}) ::sigaddset(&set_, s);
        ::pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    }
    /// Calls `stop` at the first one; a second ends the process at once.
    void watch(std::function<void()> stop) {
        file_descriptor fd(::signalfd(-1, &set_, SFD_CLOEXEC), system_calls::kernel());
        std::thread([set = set_, fd = std::move(fd), stop = std::move(stop)] {
            signalfd_siginfo info{};
            for (int count = 0;;) {
                if (::read(fd.get(), &info, sizeof info) != static_cast<ssize_t>(sizeof info)) continue;
                if (++count == 1)
                    stop();
                else
                    ::_exit(128 + static_cast<int>(info.ssi_signo));
            }
        }).detach();
    }

private:
    sigset_t set_{};
};

std::string help_text() {
    auto const quarter = usable_memory_bytes() / 4 / 1'000'000;
    return "Usage: varve monitor --dir D (--unix PATH | --tcp HOST:PORT) [options]\n"
           "Owns the stores below D for trainers (train and bench with --monitor), writes and commits what they hand over, and outlives\n"
           "them: a checkpoint that is whole here becomes durable whatever becomes of its trainer, and the newest one stays in memory for\n"
           "a while, for a restart. Ends on SIGTERM or SIGINT once everything whole is committed.\n"
           "With --peer every checkpoint that is committed here is sent to a monitor on another host too, and a restart may come from there:\n"
           "what is not here, or newer there, is fetched. Nothing here waits for the peer; one that is slow or away gets the newest when it can.\n"
           "Pools, blocks and the checkpoints that linger never take more memory than --memory-mb (here " +
           std::to_string(quarter) +
           " MB unless it is given): a trainer whose pool is larger is refused, or one in a GPU's memory whose blocks on their way are.";
}

}  // namespace

int monitor(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    auto where = option_group("Where"), what = option_group("What it holds"),
         secure = option_group("TCP between hosts: TLS 1.3, a certificate on both sides (PEM)"), other = option_group("Other");
    auto text = [](char const* name) { return po::value<std::string>()->value_name(name); };
    where.add_options()("dir", text("D"), "stores that trainers name stand below it; made if absent")(
        "unix", text("PATH"), "listen at a Unix socket, mode 0600; a dead monitor's is replaced")(
        "tcp", text("HOST:PORT"), "listen at TCP; without certificates a loopback address alone")(
        "peer", text("HOST:PORT"), "the monitor that gets a copy of every store, under its folder's name; without certificates on loopback alone");
    what.add_options()("linger", po::value<std::string>()->value_name("S")->default_value("60"),
                       "seconds that the newest checkpoint stays in memory once its trainer has gone")(
        "memory-mb", text("M"), "MB (10^6 bytes) that pools and lingering checkpoints may take together (default: a quarter of the usable memory)")(
        "num-threads", po::value<std::string>()->value_name("N")->default_value("8"), "writes at once to the disk");
    secure.add_options()("cert", text("FILE"), "our certificate")("key", text("FILE"), "its key")("ca", text("FILE"),
                                                                                                  "the authority that the other side's must be of");
    other.add_options()("status", "print what the monitor at --unix or --tcp holds, and end")("json", "with --status: as JSON")(
        "once", "end by itself when its trainers have gone and nothing lingers")("help", "this text");
    po::options_description shown(120), all(120);
    shown.add(where).add(what).add(secure).add(other);
    // For whoever starts one by itself: where to say that it listens, or why not.
    if (auto const asks = std::find(args.begin(), args.end(), "--ready-fd"); asks != args.end()) other.add_options()("ready-fd", text("N"), "");
    all.add(where).add(what).add(secure).add(other);
    auto const values = parse_command_line(args, help_text(), std::find(args.begin(), args.end(), "--help") != args.end() ? shown : all, {}, out);
    if (!values) return 0;

    if (values->count("status")) return print_monitor_status(addresses(*values).front(), tls_of(*values, false), values->count("json") > 0, out);
    if (!values->count("dir")) throw usage_error("--dir is missing: say where stores stand, for instance --dir ./checkpoints");
    asio::monitor_options o;
    o.dir = std::filesystem::absolute((*values)["dir"].as<std::string>());
    o.listen = addresses(*values);
    o.tls = tls_of(*values, true);
    if (values->count("peer")) {
        try {
            o.peer = asio::parse_address("tcp:" + (*values)["peer"].as<std::string>());
        } catch (error const& e) {
            throw usage_error(std::string("--peer: ") + e.what());
        }
        o.peer_tls = tls_of(*values, false);
    }
    o.linger = std::chrono::seconds(number(*values, "linger", 1'000'000));
    o.memory_limit_bytes = values->count("memory-mb") ? number(*values, "memory-mb", 1'000'000'000) * 1'000'000 : usable_memory_bytes() / 4;
    o.writes_at_once = static_cast<unsigned>(number(*values, "num-threads", 1024));
    o.once = values->count("once") > 0;
    o.device_memory = gpu_reader();
    o.threads = std::clamp(std::thread::hardware_concurrency(), 2u, 4u);
    std::mutex one_line;
    o.log = [&](std::string const& line) {
        std::lock_guard lock(one_line);
        err << "varve monitor: " << detail::printable(line) << std::endl;
    };
    int const ready = values->count("ready-fd") ? static_cast<int>(number(*values, "ready-fd", 1 << 20)) : -1;
    auto say_ready = [&](std::string line) {
        if (ready < 0) return;
        line += '\n';
        auto const n = ::write(ready, line.data(), line.size());
        static_cast<void>(n);
        ::close(ready);
    };
    std::signal(SIGPIPE, SIG_IGN);  // whoever read our messages may have gone
    ending_signals signals;
    std::unique_ptr<asio::monitor> serving;
    try {
        detail::make_folders(detail::absolute_folder(o.dir), system_calls::kernel());
        serving = std::make_unique<asio::monitor>(o);
    } catch (error const& e) {
        say_ready(e.what());
        if (e.code() == std::errc::operation_not_permitted) throw usage_error(e.what());
        throw;
    } catch (std::exception const& e) {
        say_ready(e.what());
        throw;
    }
    for (auto const& at : serving->where())
        o.log("listens at " + at.text() + ", holds at most " + std::to_string(o.memory_limit_bytes / 1'000'000) + " MB");
    if (o.peer) o.log("sends copies to the peer at " + o.peer->text() + (o.peer_tls ? ", TLS" : ""));
    signals.watch([&] {
        notify("STOPPING=1");
        serving->stop();
    });
    say_ready("ready");
    notify("READY=1\nSTATUS=listens at " + serving->where().front().text());
    serving->run();
    o.log("has ended");
    return 0;
}

}  // namespace varve::tool
