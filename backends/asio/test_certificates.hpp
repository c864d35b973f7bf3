#pragma once

#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

#include "scratch_folder.hpp"
#include "support.hpp"
#include "varve/asio/transport.hpp"
#include "varve/error.hpp"

namespace varve_test {

/// An authority and certificates that it signed, made by the command openssl; the test is skipped without it, or without TLS.
///
/// `server` and `client` are for 127.0.0.1, `elsewhere` names another host, `stranger` is of another authority, `ca2`.
class test_certificates {
public:
    explicit test_certificates(std::string const& addresses = "IP:127.0.0.1,DNS:localhost") {
        if (std::system("openssl version > /dev/null 2>&1") != 0) {
            skip("the command openssl is not installed");
            return;
        }
        for (char const* authority : {"ca", "ca2"})
            run("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=" + std::string(authority) + " -keyout " +
                path(std::string(authority) + ".key") + " -out " + path(std::string(authority) + ".pem"));
        make("server", "ca", addresses);
        make("client", "ca", addresses);
        make("elsewhere", "ca", "IP:192.0.2.7");
        make("stranger", "ca2", addresses);
        try {
            load("server", true);
            usable_ = true;
        } catch (varve::error const& e) {
            if (e.code() == varve::errc::unsupported) skip(e.what());
            throw;
        }
    }

    /// False where the test was skipped.
    bool usable() const noexcept { return usable_; }
    std::string path(std::string const& name) const { return (folder_.path() / name).string(); }
    varve::asio::tls_files files(std::string const& name, std::string const& authority = "ca") const {
        return {path(name + ".pem"), path(name + ".key"), path(authority + ".pem")};
    }
    std::shared_ptr<varve::asio::tls_context const> load(std::string const& name, bool server, std::string const& authority = "ca") const {
        return varve::asio::load_tls(files(name, authority), server);
    }

private:
    void run(std::string const& command) const {
        BOOST_TEST_REQUIRE(std::system(("openssl " + command + " > /dev/null 2>&1").c_str()) == 0, "openssl " << command);
    }

    void make(std::string const& name, std::string const& authority, std::string const& addresses) const {
        run("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=" + name + " -keyout " + path(name + ".key") + " -out " +
            path(name + ".csr"));
        std::ofstream(path(name + ".ext")) << "subjectAltName=" << addresses << "\n";
        run("x509 -req -in " + path(name + ".csr") + " -CA " + path(authority + ".pem") + " -CAkey " + path(authority + ".key") +
            " -CAcreateserial -days 2 -extfile " + path(name + ".ext") + " -out " + path(name + ".pem"));
    }

    scratch_folder folder_;
    bool usable_ = false;
};

}  // namespace varve_test
