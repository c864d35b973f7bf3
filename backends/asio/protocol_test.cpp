#include <boost/test/unit_test.hpp>

#include <functional>
#include <random>

#include "monitor_workplace.hpp"
#include "mutate.hpp"
#include "support.hpp"
#include "test_certificates.hpp"

namespace varve_test {

namespace {

/// Does what no trainer of ours does; the monitor must end that connection with the words, and serve the others as before.
void ends_with(std::string const& words, std::function<void(raw_trainer&)> misbehave, std::size_t images = 2) {
    workplace w;
    auto good = w.trainer(1, "good");
    good.greet();
    good.set(1);
    good.begin(1, 1);
    good.send_block(1, 0, 0);
    {
        auto bad = w.trainer(images, "bad");
        bad.greet();
        bad.set(1);
        misbehave(bad);
        auto const why = bad.peer.refusal();
        BOOST_TEST(has(why, words), why);
        BOOST_TEST(!has(why, "\n"));
    }
    for (std::size_t i = 1; i < good.plans.size(); ++i) good.send_block(1, i, i);
    good.commit(1);
    good.peer.expect<wire::durable>();
    BOOST_TEST(good.holds(w.file(1, "good"), 1));
    BOOST_TEST(w.store_is_free("bad"));
    auto after = w.trainer(1, "bad");
    after.greet();
    after.save(1, 1);
    after.peer.expect<wire::durable>();
    BOOST_TEST(after.holds(w.file(1, "bad"), 1));
}

template <class Message>
std::vector<std::byte> frame(std::uint64_t number, Message const& m) {
    std::vector<std::byte> bytes;
    wire::frame_writer writer;
    for (std::uint64_t i = 0; i <= number; ++i) {
        bytes.clear();
        writer.append(bytes, m);
    }
    return bytes;
}

/// Everything that a trainer of two saves says, of one block each, message by message.
std::vector<std::vector<std::byte>> two_saves(raw_trainer const& t) {
    std::vector<std::vector<std::byte>> out;
    wire::frame_writer writer;
    auto say = [&](auto const& m) { writer.append(out.emplace_back(), m); };
    say(t.hello);
    for (std::uint64_t save : {1, 2}) {
        say(wire::begin{save, save});
        for (auto const& plan : t.plans) {
            auto const bytes = t.block(plan);
            auto const at = (save - 1) * raw_trainer::block_bytes;
            if (t.pool) std::memcpy(t.pool + at, bytes.data(), bytes.size());
            if (t.pool)
                say(wire::block_ref{save, plan.offset_bytes, static_cast<std::uint32_t>(bytes.size()), 0, at});
            else
                say(wire::block_data{save, plan.offset_bytes, bytes});
        }
        say(wire::commit{save, {{"who", "test"}}, t.pool ? std::vector<std::uint64_t>{} : t.digests()});
    }
    say(wire::fetch{true, 1, 1});
    say(wire::status{});
    say(wire::goodbye{});
    return out;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_block_that_cannot_be_ends_the_connection) {
    auto ref = [](raw_trainer& t, std::uint64_t offset, std::uint32_t size, std::uint32_t region = 0, std::uint64_t at = 0) {
        t.begin(1, 1);
        t.peer.send(wire::block_ref{1, offset, size, region, at});
    };
    ends_with("where none can be", [&](auto& t) { ref(t, 0, 65536); });
    ends_with("where none can be", [&](auto& t) { ref(t, t.layout.header_bytes + 1, 65536); });
    ends_with("where none can be", [&](auto& t) { ref(t, t.layout.header_bytes, 1000); });
    ends_with("where none can be", [&](auto& t) { ref(t, t.layout.header_bytes, 0); });
    ends_with("where none can be", [&](auto& t) { ref(t, t.layout.size_bytes, 65536); });
    ends_with("where none can be", [&](auto& t) { ref(t, ~std::uint64_t{0} - 65535, 65536); });
    ends_with("outside of the pool", [&](auto& t) { ref(t, t.layout.header_bytes, 65536, 1); });
    ends_with("outside of the pool", [&](auto& t) { ref(t, t.layout.header_bytes, 65536, 0, t.pool_bytes); });
    ends_with("outside of the pool", [&](auto& t) { ref(t, t.layout.header_bytes, 65536, 0, t.pool_bytes - 65535); });
    ends_with("outside of the pool", [&](auto& t) { ref(t, t.layout.header_bytes, 65536, 0, ~std::uint64_t{0}); });
}

BOOST_AUTO_TEST_CASE(what_comes_twice_ends_the_connection) {
    ends_with("came before", [](auto& t) {
        t.begin(1, 1);
        t.send_block(1, 0, 0);
        t.send_block(1, 0, 1);
    });
    ends_with("the monitor's already", [](auto& t) {
        t.begin(1, 1);
        t.send_block(1, 0, 0);
        t.send_block(1, 1, 0);
    });
    ends_with("begun before", [](auto& t) {
        t.begin(1, 1);
        t.begin(1, 2);
    });
    ends_with("HELLO came before", [](auto& t) { t.peer.send(t.hello); });
    ends_with("not under way", [](auto& t) {
        t.save(1, 1);
        t.commit(1);
    });
    // A frame that was seen already, number and all.
    ends_with("where 1 comes next", [](auto& t) { t.peer.send_bytes(frame(0, wire::begin{1, 1})); });
    ends_with("where 1 comes next", [](auto& t) { t.peer.send_bytes(frame(2, wire::begin{1, 1})); });
}

BOOST_AUTO_TEST_CASE(a_save_that_is_none_ends_the_connection) {
    ends_with("not under way", [](auto& t) { t.send_block(1, 0, 0); });
    ends_with("not under way", [](auto& t) { t.peer.send(wire::commit{9, {}, {}}); });
    ends_with("lacks bytes", [](auto& t) {
        t.begin(1, 1);
        t.send_block(1, 0, 0);
        t.commit(1);
    });
    ends_with("of step 0", [](auto& t) { t.begin(1, 0); });
    ends_with("1 digests", [](auto& t) {
        t.begin(1, 1);
        t.send_blocks(1);
        t.peer.send(wire::commit{1, {}, {0}});
    });
    ends_with("too many saves", [](auto& t) {
        for (std::uint64_t i = 1; i < 2000; ++i) t.begin(i, i);
    });
}

BOOST_AUTO_TEST_CASE(payload_and_references_are_not_mixed_and_credit_is_kept) {
    ends_with("beside a pool", [](auto& t) {
        t.begin(1, 1);
        t.peer.send(wire::block_data{1, t.plans[0].offset_bytes, t.block(t.plans[0])});
    });
    ends_with(
        "no pool",
        [](auto& t) {
            t.begin(1, 1);
            t.peer.send(wire::block_ref{1, t.plans[0].offset_bytes, static_cast<std::uint32_t>(t.plans[0].size_bytes), 0, 0});
        },
        0);
    ends_with(
        "credit",
        [](auto& t) {
            for (std::uint64_t i = 1; t.peer.write_error == std::error_code() && i < 10; ++i) {
                t.begin(i, i);
                for (std::size_t b = 0; b + 1 < t.plans.size(); ++b) t.send_block(i, b);
            }
        },
        0);
}

BOOST_AUTO_TEST_CASE(frames_of_another_protocol_end_the_connection) {
    auto changed = [](std::size_t at, std::uint8_t value) {
        return [=](raw_trainer& t) {
            auto bytes = frame(1, wire::begin{1, 1});
            bytes[at] = static_cast<std::byte>(value);
            t.peer.send_bytes(bytes);
        };
    };
    ends_with("VRV1", changed(0, 'H'));
    ends_with("of type", changed(4, 99));
    ends_with("of type", changed(4, static_cast<std::uint8_t>(wire::message::welcome)));
    ends_with("what must be zero", changed(6, 1));
    ends_with("what must be zero", changed(12, 1));
    ends_with("bytes, type", changed(11, 0xFF));
    ends_with("ends within", changed(8, 8));
}

BOOST_AUTO_TEST_CASE(a_hello_that_makes_no_sense_is_refused) {
    auto refused = [](std::string const& words, std::function<void(raw_trainer&)> change) {
        workplace w;
        auto t = w.trainer(1);
        change(t);
        t.peer.send(t.hello, {t.memory.get()});
        auto const why = t.peer.refusal();
        BOOST_TEST(has(why, words), why);
        BOOST_TEST(!std::filesystem::exists(w.folder.path() / "stores/run"));
    };
    refused("version", [](auto& t) { t.hello.version = 9; });
    refused("format", [](auto& t) { t.hello.extension = ".pt"; });
    refused("as large as its tensors", [](auto& t) { t.hello.image_bytes += 65536; });
    refused("impossible shape", [](auto& t) { t.hello.layers[0].tensors[0].shape = {1 << 30, 1 << 30, 1 << 30, 1 << 30}; });
    refused("impossible shape", [](auto& t) { t.hello.layers[0].tensors[0].shape = {-1}; });
    refused("another way", [](auto& t) {
        t.hello.header_bytes -= 4096;
        t.hello.image_bytes -= 4096;
    });
    refused("blocks of", [](auto& t) { t.hello.block_bytes = 1000; });
    refused("blocks of", [](auto& t) { t.hello.block_bytes = 0; });
    refused("a count", [](auto& t) { t.hello.in_flight = 0; });
    refused("a count", [](auto& t) { t.hello.keep = 0; });
    refused("descriptors", [](auto& t) { t.hello.region_bytes.push_back(4096); });
    refused("another size", [](auto& t) { t.hello.region_bytes[0] /= 2; });
    refused("of fixed size", [](auto& t) {
        t.memory = {::memfd_create("open to change", MFD_CLOEXEC | MFD_ALLOW_SEALING), varve::system_calls::kernel()};
        BOOST_TEST_REQUIRE(::ftruncate(t.memory.get(), static_cast<off_t>(t.pool_bytes)) == 0);
    });
    refused("of fixed size", [](auto& t) { t.memory = {::open("/dev/null", O_RDWR | O_CLOEXEC), varve::system_calls::kernel()}; });
    refused("two tensors", [](auto& t) { t.hello.layers[1].tensors[0].name = "a.w"; });
    refused("no name", [](auto& t) { t.hello.store = ""; });
    refused("no name", [](auto& t) { t.hello.store = "a\nb"; });
    refused("absolute path", [](auto& t) { t.hello.store = "../elsewhere"; });
    refused("absolute path", [](auto& t) { t.hello.store = ".."; });
}

BOOST_AUTO_TEST_CASE(greetings_that_are_never_finished_take_no_more_memory_than_there_is_for_them) {
    constexpr std::uint32_t megabytes = 100;
    workplace w;
    auto const begun = [&](raw_peer& p) {
        auto bytes = frame(0, wire::hello{});
        for (unsigned i = 0; i < 4; ++i) bytes[8 + i] = static_cast<std::byte>((megabytes << 20) >> 8 * i);
        bytes.resize(200'000);
        p.send_bytes(bytes);
    };
    {
        raw_peer first(w.monitor->where()), second(w.monitor->where()), third(w.monitor->where());
        begun(first);
        begun(second);
        BOOST_TEST(w.becomes([](auto const& s) { return s["memory_used_bytes"] == std::uint64_t{2 * megabytes} << 20; }));
        begun(third);
        auto const why = third.refusal();
        BOOST_TEST(has(why, "others are sending large greetings"), why);
    }
    BOOST_TEST(w.becomes([](auto const& s) { return s["memory_used_bytes"] == 0; }));
}

BOOST_AUTO_TEST_CASE(of_a_long_message_that_has_no_place_there_its_header_is_enough) {
    auto const header_of_a_long_one = [](std::uint64_t number, auto const& m) {
        auto bytes = frame(number, m);
        for (unsigned i = 0; i < 4; ++i) bytes[8 + i] = static_cast<std::byte>((wire::most_control_bytes >> 8 * i) & 0xff);
        bytes.resize(wire::header_bytes);
        return bytes;
    };
    workplace w;
    raw_peer first(w.monitor->where());
    first.send_bytes(header_of_a_long_one(0, wire::begin{1, 1}));
    BOOST_TEST(has(first.refusal(), "HELLO must come first"));
    auto t = w.trainer(1);
    t.greet();
    t.peer.send_bytes(header_of_a_long_one(1, wire::fetch{true, 1, 1}));
    BOOST_TEST(has(t.peer.refusal(), "never so long"));
}

BOOST_AUTO_TEST_CASE(over_tcp_a_store_is_a_name_below_the_folder) {
    workplace w(false);
    for (std::string const& name : {std::string("/tmp/elsewhere"), std::string("a/b"), std::string(".."), std::string(300, 'x')}) {
        auto t = w.trainer(0, name);
        t.peer.send(t.hello);
        BOOST_TEST(has(t.peer.refusal(), "must be a name below"));
    }
}

BOOST_AUTO_TEST_CASE(over_a_unix_socket_a_store_may_stand_anywhere) {
    workplace w;
    auto t = w.trainer(1, (w.folder.path() / "elsewhere").string());
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    BOOST_TEST(t.holds(w.folder.path() / "elsewhere" / varve::detail::checkpoint_name(1, ".safetensors"), 1));
    // The same one, whether it is there yet or not.
    auto with_slash = w.trainer(1, (w.folder.path() / "new" / "").string());
    with_slash.greet();
    auto const stores = w.status()["stores"];
    BOOST_TEST(std::any_of(stores.begin(), stores.end(), [&](auto const& s) { return s["path"] == (w.folder.path() / "new").string(); }));
}

BOOST_AUTO_TEST_CASE(who_says_nothing_is_let_go_in_time) {
    for (bool unix_socket : {true, false}) {
        workplace w(unix_socket, [](auto& o) { o.hello_limit = 200ms; });
        raw_peer silent(w.monitor->where());
        BOOST_TEST(has(silent.refusal(), "no HELLO within 200 ms"));
        // Half of a message is no message.
        raw_peer half(w.monitor->where());
        auto const bytes = frame(0, wire::status{});
        half.send_bytes(std::span(bytes).first(7));
        BOOST_TEST(has(half.refusal(), "no HELLO within 200 ms"));
    }
}

/// Over TCP it soon misses who is silent; a Unix socket, the second address, is for those that a slow test is not to lose.
struct impatient_workplace : workplace {
    impatient_workplace()
        : workplace(false, [this](auto& o) {
              o.listen.push_back(va::parse_address("unix:" + (folder.path().filename() / "s").string()));
              o.ping_every = 50ms;
              o.silence_limit = 300ms;
          }) {}
    raw_trainer patient_trainer() { return {monitor->get().where().at(1), "run", 0}; }
};

BOOST_FIXTURE_TEST_CASE(a_peer_over_tcp_that_goes_silent_is_let_go_and_its_store_is_free, impatient_workplace) {
    {
        auto before = patient_trainer();
        before.greet();
        before.save(1, 1);
        before.peer.expect<wire::durable>();
    }
    auto t = trainer(0);
    t.greet();
    t.set(2);
    t.begin(2, 2);
    t.send_block(2, 0);
    // The socket stays open, as with a peer behind a network that is gone.
    BOOST_TEST(store_is_free());
    BOOST_TEST(has(t.peer.refusal(), "nothing was heard"));
    BOOST_TEST(t.holds(file(1), 1));
}

BOOST_FIXTURE_TEST_CASE(a_receiver_that_stalls_holds_up_nobody, impatient_workplace) {
    auto t = patient_trainer();
    t.greet();
    for (std::uint64_t i = 1; i <= 2; ++i) {
        t.save(i, i);
        t.peer.expect<wire::durable>();
    }
    // Asks for a checkpoint and reads nothing of it.
    raw_peer stalled(monitor->where());
    stalled.greet(wire::purpose::fetch);
    stalled.send(wire::fetch{});
    t.save(3, 3);
    t.peer.expect<wire::durable>();
    auto const others = [&] {
        t.peer.hears_within(10ms);
        return status()["connections"].get<int>();
    };
    for (int i = 0; i < 300 && others() > 1; ++i) {
        t.save(static_cast<std::uint64_t>(4 + i), static_cast<std::uint64_t>(4 + i));
        t.peer.expect<wire::durable>();
    }
    BOOST_TEST(others() == 1);
}

BOOST_AUTO_TEST_CASE(who_asks_and_never_listens_is_let_go) {
    workplace w;
    auto t = w.trainer(1);
    t.greet();
    raw_peer deaf(w.monitor->where());
    deaf.greet(wire::purpose::status);
    // Answers of some hundred bytes each, of which 20 MB may wait.
    for (int i = 0; i < 500'000 && !deaf.write_error; ++i) deaf.send(wire::status{});
    BOOST_TEST(static_cast<bool>(deaf.write_error));
    BOOST_TEST(w.becomes([](auto const& s) { return s["connections"] == 1; }));
    t.save(1, 1);
    t.peer.expect<wire::durable>();
}

BOOST_AUTO_TEST_CASE(who_fetches_and_never_listens_is_let_go) {
    workplace w;
    auto t = w.trainer(1);
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    raw_peer deaf(w.monitor->where());
    deaf.greet(wire::purpose::fetch);
    // Each answer has a descriptor.
    for (int i = 0; i < 2'000 && !deaf.write_error; ++i) {
        deaf.send(wire::fetch{true, 1, 0});
        std::this_thread::sleep_for(1ms);
    }
    BOOST_TEST(has(deaf.refusal(), "before the last one was answered"));
}

BOOST_AUTO_TEST_CASE(who_speaks_no_tls_to_a_monitor_that_does_is_not_heard) {
    test_certificates files;
    if (!files.usable()) return;
    workplace w(false, [&](auto& o) { o.tls = files.load("server", true); });
    raw_peer plain(w.monitor->where()), silent(w.monitor->where());
    plain.send(wire::hello{});
    BOOST_CHECK_THROW(plain.expect<wire::welcome>(), std::runtime_error);
    auto t = w.trainer(0, "run", files.load("client", false));
    t.greet();
    t.save(1, 1);
    t.peer.expect<wire::durable>();
    BOOST_TEST(silent.hears_within(20s), "a handshake that never begins is waited for");
}

BOOST_AUTO_TEST_CASE(whatever_a_trainer_says_it_ends_no_connection_but_its_own_and_leaves_whole_checkpoints) {
    for (bool unix_socket : {true, false}) {
        workplace w(unix_socket);
        auto const stores = w.folder.path() / "stores";
        auto const is_good_alone = [](auto const& st) { return st["connections"] == 1 && st["stores"].size() == 1; };
        auto good = w.trainer(unix_socket ? 1 : 0, "good");
        good.greet();
        good.set(1);
        good.begin(1, 1);
        good.send_block(1, 0);
        for (unsigned round = 0; round < (full() ? 1000u : 150u); ++round) {
            std::mt19937_64 random(round);
            bool const as_it_is = round < 3 || round % 10 == 0;
            // Over a Unix socket a store may stand anywhere, and a HELLO that was changed may name any place.
            bool const greets_wrongly = !as_it_is && !unix_socket && round % 4 == 1;
            auto const store = greets_wrongly ? "other" : "bad" + std::to_string(round % 3);
            BOOST_TEST_REQUIRE(w.store_is_free(store), "round " << round);
            {
                raw_trainer bad(w.monitor->where(), store, unix_socket ? 2 : 0, nullptr, 1000);
                bad.set(1);
                auto said = two_saves(bad);
                if (greets_wrongly) mutate(said.front(), random, 0);
                for (auto n = as_it_is ? 0 : 1 + random() % 2; n > 0; --n)
                    if (auto& one = said[1 + random() % (said.size() - 1)]; one.size() > 6) mutate(one, random, 0);
                bad.peer.send_bytes(said.front(), unix_socket ? std::vector{bad.memory.get()} : std::vector<int>{});
                if (greets_wrongly)
                    bad.peer.hears_within(50ms);
                else
                    bad.peer.expect<wire::welcome>();
                // Without the farewell, behind which nothing is answered.
                if (as_it_is) said.pop_back();
                std::vector<std::byte> bytes;
                for (auto const& one : std::span(said).subspan(1)) bytes.insert(bytes.end(), one.begin(), one.end());
                for (std::size_t at = 0; at < bytes.size() && !bad.peer.write_error;) {
                    auto const n = std::min<std::size_t>(1 + random() % 4000, bytes.size() - at);
                    bad.peer.send_bytes(std::span(bytes).subspan(at, n));
                    at += n;
                }
                for (std::uint64_t save = 1; as_it_is && save <= 2; ++save) BOOST_TEST(bad.peer.expect<wire::durable>().save == save);
            }
            if (!greets_wrongly) continue;
            // It may have named any store, with any tensors and many files.
            BOOST_TEST_REQUIRE(w.becomes(is_good_alone), "round " << round);
            for (auto const& entry : std::filesystem::directory_iterator(stores))
                if (auto const name = entry.path().filename().string(); name != "good" && !name.starts_with("bad"))
                    std::filesystem::remove_all(entry);
        }
        for (std::size_t i = 1; i < good.plans.size(); ++i) good.send_block(1, i, i);
        good.commit(1);
        good.peer.expect<wire::durable>();
        BOOST_TEST(good.holds(w.file(1, "good"), 1));
        BOOST_TEST_REQUIRE(w.becomes(is_good_alone));
        std::size_t whole = 0;
        for (auto const& entry : std::filesystem::recursive_directory_iterator(stores)) {
            if (entry.path().extension() != ".safetensors") continue;
            varve::file_descriptor const fd(::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC), varve::system_calls::kernel());
            BOOST_CHECK_NO_THROW(varve::safetensors().verify(fd.get(), 1));
            ++whole;
        }
        BOOST_TEST(whole > 3u);
        for (auto const* store : {"bad0", "bad1", "bad2"}) {
            raw_trainer after(w.monitor->where(), store, unix_socket ? 1 : 0, nullptr, 1000);
            after.greet();
            after.save(1, 1'000'000);
            after.peer.expect<wire::durable>();
            BOOST_TEST(after.holds(w.file(1'000'000, store), 1'000'000));
        }
    }
}

}  // namespace varve_test
