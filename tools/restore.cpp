#include <algorithm>
#include <charconv>
#include <optional>
#include <ostream>
#include <utility>

#include "varve/detail/digest.hpp"
#include "varve/detail/safetensors_match.hpp"
#include "varve/detail/safetensors_write.hpp"
#include "varve/detail/text.hpp"
#include "varve/error.hpp"
#include "varve/format/safetensors.hpp"

#include "atomic_file.hpp"
#include "checkpoint_file.hpp"
#include "command_line.hpp"
#include "commands.hpp"
#include "progress.hpp"
#include "pt_file.hpp"
#include "store_reader.hpp"
#include "table.hpp"

namespace varve::tool {

namespace {

struct request {
    std::filesystem::path from;
    std::filesystem::path to;
    std::optional<std::uint64_t> step;
    bool model_only = false;
    bool verify = true;
};

struct source {
    std::filesystem::path path;
    std::unique_ptr<checkpoint_file> file;
};

source open_source(std::filesystem::path const& path, bool verify, std::ostream& err) {
    source out{path, open_checkpoint(path)};
    if (!verify) return out;
    at_path(path, [&] {
        reading_progress shown(err, "checks " + detail::printable(path.string()), out.file->file_bytes());
        format_of(out.file->fd())->verify(out.file->fd(), reading_workers());
    });
    return out;
}

/// The newest checkpoint that is whole; what is broken on the way there is said.
source find_source(request const& r, std::ostream& err) {
    if (!std::filesystem::is_directory(r.from)) return open_source(r.from, r.verify, err);
    for (bool let_go = true; let_go;) {
        let_go = false;
        auto const listed = list_store(r.from);
        expect_all_read(listed, r.step);
        for (auto const& b : listed.broken) err << "broken: " << detail::printable(b.path.string()) << ": " << b.why << '\n';
        for (auto const& c : listed.checkpoints) {
            if (r.step && c.step != *r.step) continue;
            try {
                return open_source(c.path, r.verify, err);
            } catch (error const& e) {
                let_go = was_let_go(e, c.path);
                if (let_go) break;
                if (e.code().category() != category() || e.code() == errc::unsupported) throw;
                err << "broken: " << e.what() << '\n';
            }
        }
        if (let_go || !r.step) continue;
        std::string steps;
        for (auto c = listed.checkpoints.rbegin(); c != listed.checkpoints.rend(); ++c)
            steps += (steps.empty() ? "" : ", ") + std::to_string(c->step);
        throw error(errc::no_checkpoint, detail::printable(r.from.string()) + ": no whole checkpoint of step " + std::to_string(*r.step) +
                                             (steps.empty() ? "" : "; there are " + steps));
    }
    throw error(errc::no_checkpoint, detail::printable(r.from.string()) + ": no whole checkpoint");
}

/// Step, sequence and the user's metadata; 0 where a file of others has no count.
checkpoint_identity identity_of(checkpoint_file const& file) {
    checkpoint_identity out;
    auto count = [&](std::string_view key) {
        std::uint64_t value = 0;
        if (auto found = file.metadata().find(std::string(key)); found != file.metadata().end())
            std::from_chars(found->second.data(), found->second.data() + found->second.size(), value);
        return value;
    };
    out.step = count(detail::step_key);
    out.sequence = count(detail::sequence_key);
    for (auto const& [key, value] : file.metadata())
        if (!key.starts_with(detail::reserved_prefix)) out.metadata.emplace(key, value);
    return out;
}

/// The file's tensors as a state, in the order of the file's own list: a layer each, so that none changes its place.
/// Their bytes stay in the file.
state state_of(checkpoint_file const& file, bool model_only) {
    state s;
    auto counts = [&](std::string_view name) { return !model_only || name.starts_with(detail::model_prefix); };
    auto tensors = file.tensors();
    std::sort(tensors.begin(), tensors.end(), [](auto const& a, auto const& b) { return a.header_index < b.header_index; });
    for (auto const& t : tensors)
        if (counts(t.name)) s.layers.push_back({t.name, {{t.name, t.type, t.shape, nullptr, {}, memory_kind::host}}});
    for (auto const& [alias, stored] : aliases_of(file.metadata()))
        if (counts(alias) && counts(stored)) s.aliases.emplace(alias, stored);
    return s;
}

/// Writes the tensors in pieces that begin where a digest's chunk begins.
void write_safetensors(checkpoint_file const& from, checkpoint_identity const& identity, state const& s, atomic_file& to) {
    // Files of others may have more metadata than a checkpoint has room for.
    auto const metadata_bytes = std::max<std::uint64_t>(safetensors::default_metadata_bytes, detail::user_metadata_text(identity.metadata).size());
    safetensors const format(metadata_bytes);
    auto const img = format.lay_out(s);
    std::map<std::string_view, file_tensor const*> sources;
    for (auto const& t : from.tensors()) sources.emplace(t.name, &t);

    std::vector<std::byte> piece(detail::granule_bytes);
    std::vector<std::uint64_t> chunks(detail::chunk_count(img.data_bytes()));
    std::size_t filled = 0, chunk_count = 0;
    std::uint64_t at = img.header_bytes;
    auto flush = [&] {
        auto bytes = std::span(piece).first(filled);
        chunk_count += detail::chunk_digests(bytes, std::span(chunks).subspan(chunk_count));
        to.write(bytes, at);
        at += filled;
        filled = 0;
    };
    for (auto const& p : img.tensors) {
        auto const& t = *sources.at(s.layers[p.layer].tensors[p.tensor].name);
        for (std::uint64_t done = 0; done < p.size_bytes;) {
            auto n = static_cast<std::size_t>(std::min<std::uint64_t>(p.size_bytes - done, piece.size() - filled));
            from.read(t, done, std::span(piece).subspan(filled, n));
            filled += n;
            done += n;
            if (filled == piece.size()) flush();
        }
    }
    flush();
    to.write(format.header(s, img, {identity.step, identity.sequence, identity.metadata}, chunks), 0);
}

request parse(boost::program_options::variables_map const& values) {
    request r;
    r.from = values["PATH"].as<std::string>();
    if (!values.count("output")) throw usage_error("no --output given; give the file to write, F.safetensors or F.pt");
    r.to = values["output"].as<std::string>();
    if (r.to.extension() != ".safetensors" && r.to.extension() != ".pt")
        throw usage_error("--output " + detail::printable(r.to.string()) + " must end with .safetensors or .pt");
    if (values.count("step")) {
        auto const& text = values["step"].as<std::string>();
        std::uint64_t step = 0;
        auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), step);
        if (code != std::errc() || end != text.data() + text.size()) throw usage_error("--step must be a whole number, 0 or more");
        r.step = step;
    }
    r.model_only = values.count("model-only") > 0;
    r.verify = values.count("no-verify") == 0;
    return r;
}

}  // namespace

int restore(std::vector<std::string> const& args, std::ostream& out, std::ostream& err) {
    namespace po = boost::program_options;
    auto what = option_group("What"), where = option_group("Where"), help = option_group("Help");
    what.add_options()("step", po::value<std::string>()->value_name("S"), "the checkpoint of step S (default: the newest that is whole)")(
        "model-only", "the tensors whose names begin with model. (default: all)")(
        "no-verify", "take the bytes as they are, of files without digests too (default: every byte is checked first)");
    where.add_options()("output", po::value<std::string>()->value_name("F"), "the file to write, F.safetensors or F.pt; it appears when it is whole");
    help.add_options()("help", "this text");
    po::options_description shown(120);
    shown.add(what).add(where).add(help);
    auto values = parse_command_line(
        args, "Usage: varve restore PATH --output F [options]\nWrites a checkpoint out as a file of its own; PATH is a store or a checkpoint file.",
        shown, {"PATH"}, out);
    if (!values) return 0;
    auto const r = parse(*values);
    atomic_file to(r.to);  // first: where it cannot be, nothing need be read
    auto const from = find_source(r, err);
    auto const identity = identity_of(*from.file);
    if (r.step && identity.step != *r.step)
        throw error(errc::no_checkpoint,
                    detail::printable(from.path.string()) + ": is of step " + std::to_string(identity.step) + ", not " + std::to_string(*r.step));
    auto const chosen = state_of(*from.file, r.model_only);
    if (r.model_only && chosen.layers.empty())
        throw error(errc::mismatch, detail::printable(from.path.string()) + ": has no tensor whose name begins with model.; leave --model-only out");
    if (!r.verify) err << "not checked: the bytes of " << detail::printable(from.path.string()) << " are taken as they are, and get new digests\n";
    std::optional<reading_progress> writing(std::in_place, err, "writes " + detail::printable(r.to.string()));
    if (r.to.extension() == ".pt")
        write_archive(chosen, *from.file, identity, to);
    else
        write_safetensors(*from.file, identity, chosen, to);
    to.commit();
    writing.reset();
    out << detail::printable(r.to.string()) << ": step " << identity.step << " of " << detail::printable(from.path.string()) << ", "
        << size_text(std::filesystem::file_size(r.to)) << '\n';
    return 0;
}

}  // namespace varve::tool
