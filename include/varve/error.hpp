#pragma once

#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

namespace varve {

/// The errors that a caller may branch on; those of the operating system come as std::errc in the system category.
enum class errc {
    cancelled = 1,       ///< the checkpointer was destroyed before the save was done
    skipped,             ///< N saves were in flight and this one was not taken
    replaced,            ///< a newer save took this one's place before it began to write
    not_sealed,          ///< waited for a save that was not sealed yet
    out_of_order,        ///< begin, before_update, layer_ready and seal were called in an order that has no meaning
    state_changed,       ///< an address, shape, dtype or stride of the state is no longer what it was
    metadata_too_large,  ///< the metadata does not fit into the header's room
    malformed,           ///< a file breaks the rules of its format
    not_whole,           ///< a checkpoint's digests are missing or do not fit its bytes
    mismatch,            ///< a checkpoint is of another format, model or optimizer
    no_checkpoint,       ///< there is nothing to restore from
    not_a_store,         ///< the folder holds something else
    store_locked,        ///< another process writes to the store
    unsupported,         ///< not possible with this combination or on this machine
    monitor_lost         ///< the monitor that had the save has ended, or cannot be reached
};

/// The category of errc; its name is "varve".
inline std::error_category const& category() noexcept {
    class category_type final : public std::error_category {
        char const* name() const noexcept override { return "varve"; }
        std::string message(int value) const override {
            switch (static_cast<errc>(value)) {
            case errc::cancelled: return "cancelled";
            case errc::skipped: return "skipped: as many saves as allowed were in flight";
            case errc::replaced: return "replaced by a newer save";
            case errc::not_sealed: return "the save is not sealed yet";
            case errc::out_of_order: return "called out of order";
            case errc::state_changed: return "the state has changed its layout";
            case errc::metadata_too_large: return "the metadata is larger than the header's room";
            case errc::malformed: return "malformed file";
            case errc::not_whole: return "not a whole checkpoint";
            case errc::mismatch: return "the checkpoint is of another format, model or optimizer";
            case errc::no_checkpoint: return "no whole checkpoint";
            case errc::not_a_store: return "not a checkpoint store";
            case errc::store_locked: return "the store is in use by another writer";
            case errc::unsupported: return "not supported";
            case errc::monitor_lost: return "the monitor is lost";
            }
            return "unknown error";
        }
    };
    static category_type const instance;
    return instance;
}

inline std::error_code make_error_code(errc e) noexcept { return {static_cast<int>(e), category()}; }

/// What the control path throws: one line that says what, where and what to do, and the code to branch on.
class error : public std::runtime_error {
public:
    error(std::error_code code, std::string const& line) : std::runtime_error(line), code_(code) {}
    explicit error(std::error_code code) : error(code, code.message()) {}

    std::error_code const& code() const noexcept { return code_; }

private:
    std::error_code code_;
};

/// The error_code of a value of errno.
inline std::error_code last_system_error(int value) noexcept { return {value, std::system_category()}; }

/// Throws error with `what: message` when `code` is set.
inline void throw_if(std::error_code code, std::string const& what) {
    if (code) throw error(code, what + ": " + code.message());
}

}  // namespace varve

template <>
struct std::is_error_code_enum<varve::errc> : std::true_type {};
