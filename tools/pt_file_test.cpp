#include "pt_file.hpp"

#include <boost/test/unit_test.hpp>

#include <fcntl.h>
#include <sstream>
#include <string>

#include "files.hpp"
#include "record_archive.hpp"
#include "support.hpp"

#include "commands.hpp"

namespace {

using namespace varve_test;
namespace tool = varve::tool;

/// What `varve restore FROM --output to.pt` says where it refuses an archive with this index and a record of 1,000 bytes, `data/0`;
/// empty where it does not. Nothing is written then.
std::string refusal(temporary_folder const& dir, std::string const& index) {
    write_file(
        dir.path() / "from.pt",
        archive_with(
            {{"data/0", std::string(1000, 'x')}, {"varve/step", "1"}, {"varve/sequence", "1"}, {"varve/metadata", "{}"}, {"varve/tensors", index}}));
    std::ostringstream out, err;
    try {
        if (tool::restore({(dir.path() / "from.pt").string(), "--output", (dir.path() / "to.pt").string()}, out, err) == 0) return {};
    } catch (varve::error const& e) {
        err << e.what() << '\n';
    }
    BOOST_TEST(!std::filesystem::exists(dir.path() / "to.pt"));
    return err.str();
}

}  // namespace

BOOST_AUTO_TEST_SUITE(pt_file)

BOOST_AUTO_TEST_CASE(a_name_that_stands_twice_in_an_archive_is_refused) {
    temporary_folder dir;
    BOOST_TEST(refusal(dir, R"([["user.x","U8",[],"=00"],["user.x","U8",[1000],"data/0"]])").find("two tensors have the name user.x") !=
               std::string::npos);
}

BOOST_AUTO_TEST_CASE(an_option_that_is_no_number_is_refused) {
    temporary_folder dir;
    std::string const optimizer = R"(["model.w","U8",[1000],"data/0"],["optimizer.w.exp_avg","F32",[],"=00000000"],)"
                                  R"(["optimizer.group.0.betas.0","F64",[],"=0000000000000000"],)";
    for (std::string const lr : {R"(["optimizer.group.0.lr","F64",[0],"="])", R"(["optimizer.group.0.lr","U8",[],"=00"])"})
        BOOST_TEST(refusal(dir, "[" + optimizer + lr + "]").find("optimizer.group.0.lr is not one number") != std::string::npos);
    BOOST_TEST(refusal(dir, R"([["model.w","U8",[1000],"data/0"],["optimizer.w.step","U8",[],"=00"],["optimizer.w.exp_avg","F32",[],"=00000000"],)"
                            R"(["optimizer.group.0.betas.0","F64",[],"=0000000000000000"]])") != "");
}

BOOST_AUTO_TEST_CASE(a_tensor_without_an_element_has_any_shape) {
    temporary_folder dir;
    BOOST_TEST(refusal(dir, R"([["model.w","U8",[0,1099511627776,1099511627776],"="]])") == "");
}

BOOST_AUTO_TEST_SUITE_END()
