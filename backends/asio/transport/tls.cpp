#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/error.hpp>

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <algorithm>
#include <cerrno>
#include <limits>

#include "varve/detail/text.hpp"
#include "varve/error.hpp"

#include "socket_io.hpp"

namespace varve::asio {

class tls_context {
public:
    explicit tls_context(bool is_server) : context(boost::asio::ssl::context::tlsv13), server(is_server) {}

    mutable boost::asio::ssl::context context;
    bool server;
};

std::shared_ptr<tls_context const> load_tls(tls_files const& files, bool server) {
    auto out = std::make_shared<tls_context>(server);
    auto& context = out->context;
    auto use = [&](std::filesystem::path const& file, char const* what, auto load) {
        boost::system::error_code ec;
        load(file.string(), ec);
        if (ec)
            throw error(std::make_error_code(std::errc::invalid_argument),
                        varve::detail::printable(file.string()) + " is no usable " + what + " (PEM): " + ec.message());
    };
    use(files.authority, "certificate of an authority", [&](auto const& f, auto& ec) { context.load_verify_file(f, ec); });
    use(files.certificate, "certificate", [&](auto const& f, auto& ec) { context.use_certificate_chain_file(f, ec); });
    use(files.key, "key for the certificate", [&](auto const& f, auto& ec) { context.use_private_key_file(f, boost::asio::ssl::context::pem, ec); });
    context.set_verify_mode(boost::asio::ssl::verify_peer | boost::asio::ssl::verify_fail_if_no_peer_cert);
    auto* native = context.native_handle();
    ::SSL_CTX_set_min_proto_version(native, TLS1_3_VERSION);
    // Every connection shows its certificate: none is taken up again from a ticket.
    ::SSL_CTX_set_session_cache_mode(native, SSL_SESS_CACHE_OFF);
    ::SSL_CTX_set_num_tickets(native, 0);
    ::SSL_CTX_set_mode(native, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    // Several records a system call.
    ::SSL_CTX_set_read_ahead(native, 1);
    ::SSL_CTX_set_default_read_buffer_len(native, 256u << 10);
    return out;
}

namespace transport {

namespace {

/// OpenSSL's own socket BIO raises SIGPIPE; this one does not.
class quiet_socket {
public:
    static BIO_METHOD const* method() {
        static std::unique_ptr<BIO_METHOD, void (*)(BIO_METHOD*)> const made(make(), ::BIO_meth_free);
        return made.get();
    }
    static BIO* open(int fd) {
        auto* bio = ::BIO_new(method());
        if (!bio) throw std::bad_alloc();
        ::BIO_set_data(bio, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)));
        ::BIO_set_init(bio, 1);
        return bio;
    }

private:
    static int descriptor(BIO* bio) noexcept { return static_cast<int>(reinterpret_cast<std::intptr_t>(::BIO_get_data(bio))); }
    static bool again() noexcept { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

    static int write(BIO* bio, char const* data, int size) {
        BIO_clear_retry_flags(bio);
        auto const n = ::send(descriptor(bio), data, static_cast<std::size_t>(size), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && again()) BIO_set_retry_write(bio);
        return static_cast<int>(n);
    }
    static int read(BIO* bio, char* data, int size) {
        BIO_clear_retry_flags(bio);
        auto const n = ::recv(descriptor(bio), data, static_cast<std::size_t>(size), MSG_DONTWAIT);
        if (n < 0 && again()) BIO_set_retry_read(bio);
        if (n == 0) BIO_set_flags(bio, BIO_FLAGS_IN_EOF);
        return static_cast<int>(n);
    }
    static long control(BIO* bio, int command, long, void*) {
        if (command == BIO_CTRL_FLUSH) return 1;
        return command == BIO_CTRL_EOF ? BIO_test_flags(bio, BIO_FLAGS_IN_EOF) != 0 : 0;
    }
    static BIO_METHOD* make() {
        auto* m = ::BIO_meth_new(::BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "socket without SIGPIPE");
        if (!m) throw std::bad_alloc();
        ::BIO_meth_set_write(m, write);
        ::BIO_meth_set_read(m, read);
        ::BIO_meth_set_ctrl(m, control);
        return m;
    }
};

class tls_io final : public socket_io {
public:
    tls_io(std::shared_ptr<tls_context const> tls, int descriptor, std::string const& host)
        : tls_(std::move(tls)), ssl_(::SSL_new(tls_->context.native_handle()), ::SSL_free), fd_(descriptor) {
        if (!ssl_) throw std::bad_alloc();
        auto* bio = quiet_socket::open(descriptor);
        ::SSL_set_bio(ssl_.get(), bio, bio);
        if (tls_->server) {
            ::SSL_set_accept_state(ssl_.get());
            return;
        }
        ::SSL_set_connect_state(ssl_.get());
        in6_addr any;
        if (::inet_pton(AF_INET, host.c_str(), &any) == 1 || ::inet_pton(AF_INET6, host.c_str(), &any) == 1) {
            ::X509_VERIFY_PARAM_set1_ip_asc(::SSL_get0_param(ssl_.get()), host.c_str());
        } else {
            ::SSL_set1_host(ssl_.get(), host.c_str());
            SSL_set_tlsext_host_name(ssl_.get(), host.c_str());
        }
    }

    attempt read(std::span<std::byte> into, std::vector<file_descriptor>&) noexcept override {
        std::size_t n = 0;
        return carry_out(n, [&] { return ::SSL_read_ex(ssl_.get(), into.data(), into.size(), &n); });
    }
    attempt write(std::span<iovec const> pieces, std::vector<int>&) noexcept override {
        std::size_t n = 0;
        return carry_out(n, [&] { return ::SSL_write_ex(ssl_.get(), pieces.front().iov_base, pieces.front().iov_len, &n); });
    }
    attempt greet() noexcept override {
        std::size_t const nothing = 0;
        return carry_out(nothing, [&] { return ::SSL_do_handshake(ssl_.get()); });
    }
    void end() noexcept override {
        ::ERR_clear_error();
        if (!failed_ && ::SSL_is_init_finished(ssl_.get())) ::SSL_shutdown(ssl_.get());
        ::ERR_clear_error();
        ::shutdown(fd_, SHUT_RDWR);
    }

private:
    template <class Call>
    attempt carry_out(std::size_t const& count, Call call) noexcept {
        ::ERR_clear_error();
        errno = 0;
        int const result = call();
        if (result > 0) return {outcome::moved, count};
        int const errno_now = errno;
        switch (::SSL_get_error(ssl_.get(), result)) {
        case SSL_ERROR_WANT_READ: return {outcome::wants_read};
        case SSL_ERROR_WANT_WRITE: return {outcome::wants_write};
        case SSL_ERROR_ZERO_RETURN: return {outcome::end};
        case SSL_ERROR_SYSCALL:
            failed_ = true;
            if (errno_now == 0) return {outcome::end};
            return {outcome::failed, 0, last_system_error(errno_now)};
        default: break;
        }
        failed_ = true;
        auto const why = ::ERR_get_error();
        // Whoever is killed says no farewell. Frames say themselves where they end, so nothing is taken for whole that is not.
        if (ERR_GET_LIB(why) == ERR_LIB_SSL && ERR_GET_REASON(why) == SSL_R_UNEXPECTED_EOF_WHILE_READING) return {outcome::end};
        return {outcome::failed, 0, boost::system::error_code(static_cast<int>(why), boost::asio::error::get_ssl_category())};
    }

    std::shared_ptr<tls_context const> tls_;
    std::unique_ptr<SSL, void (*)(SSL*)> ssl_;
    int fd_;
    bool failed_ = false;
};

}  // namespace

std::unique_ptr<socket_io> make_tls_io(std::shared_ptr<tls_context const> const& tls, int descriptor, std::string const& host) {
    return std::make_unique<tls_io>(tls, descriptor, host);
}

}  // namespace transport

}  // namespace varve::asio
