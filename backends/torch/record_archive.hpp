#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "varve/concepts/format.hpp"
#include "varve/detail/digest.hpp"
#include "varve/torch/detail/zip_writer.hpp"

// What tests of hostile archives share.
namespace varve_test {

class text_stream final : public varve::byte_stream {
public:
    void write(std::span<std::byte const> bytes) override { text.append(reinterpret_cast<char const*>(bytes.data()), bytes.size()); }
    std::string text;
};

/// A zip file of these records and the digest that makes it whole, whatever they hold.
inline std::string archive_with(std::vector<std::pair<std::string, std::string>> const& records) {
    text_stream out;
    varve::libtorch::detail::zip_writer zip(out);
    for (auto const& [name, content] : records) zip.record("archive/" + name, content);
    zip.record("archive/varve/digest", varve::detail::hex(zip.digest()));
    zip.finish();
    return out.text;
}

}  // namespace varve_test
