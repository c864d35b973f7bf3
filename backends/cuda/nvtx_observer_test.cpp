#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "support.hpp"
#include "varve/checkpointer.hpp"
#include "varve/cuda/nvtx_observer.hpp"
#include "varve/scheduling/async.hpp"
#include "varve/sink/memory.hpp"
#include "varve/staging/host.hpp"

// A profiler of the test's own, linked in: what NVTX calls where Nsight would be.

namespace {

struct recorded {
    std::mutex mutex;
    std::vector<std::string> ranges;  ///< by their id
    std::vector<bool> open;
    std::vector<std::string> marks;
};
recorded& profile() {
    static recorded r;
    return r;
}

nvtxDomainHandle_t NVTX_API create_domain(char const*) { return reinterpret_cast<nvtxDomainHandle_t>(&profile()); }
void NVTX_API destroy_domain(nvtxDomainHandle_t) {}
void NVTX_API mark(nvtxDomainHandle_t, nvtxEventAttributes_t const* a) {
    std::lock_guard lock(profile().mutex);
    profile().marks.push_back(a->message.ascii);
}
nvtxRangeId_t NVTX_API start(nvtxDomainHandle_t, nvtxEventAttributes_t const* a) {
    std::lock_guard lock(profile().mutex);
    profile().ranges.push_back(a->message.ascii);
    profile().open.push_back(true);
    return profile().ranges.size() - 1;
}
void NVTX_API end(nvtxDomainHandle_t, nvtxRangeId_t id) {
    std::lock_guard lock(profile().mutex);
    BOOST_TEST(profile().open.at(id));
    profile().open.at(id) = false;
}

template <class Function>
void replace(NvtxFunctionTable table, int which, Function function) {
    *table[which] = reinterpret_cast<NvtxFunctionPointer>(function);
}

int NVTX_API attach(NvtxGetExportTableFunc_t exports) {
    auto const* callbacks = static_cast<NvtxExportTableCallbacks const*>(exports(NVTX_ETID_CALLBACKS));
    NvtxFunctionTable table = nullptr;
    unsigned size = 0;
    if (!callbacks || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
    replace(table, NVTX_CBID_CORE2_DomainCreateA, create_domain);
    replace(table, NVTX_CBID_CORE2_DomainDestroy, destroy_domain);
    replace(table, NVTX_CBID_CORE2_DomainMarkEx, mark);
    replace(table, NVTX_CBID_CORE2_DomainRangeStartEx, start);
    replace(table, NVTX_CBID_CORE2_DomainRangeEnd, end);
    return 1;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cuda_nvtx_observer)

BOOST_AUTO_TEST_CASE(a_profile_names_the_phases_of_every_save_and_closes_each_range) {
    InitializeInjectionNvtx2_fnptr = attach;
    std::vector<std::byte> bytes(varve::block_unit_bytes + 77, std::byte{3});
    varve::state s;
    s.layers.push_back({"first", {{"t", varve::dtype::U8, {static_cast<std::int64_t>(bytes.size())}, bytes.data(), {}}}});
    varve::cuda::nvtx_observer observer;
    BOOST_REQUIRE(observer.attached());
    {
        varve::checkpointer_options options;
        options.observers.add(observer);
        varve::checkpointer<varve::host_staging, varve::async<2>, varve::memory_sink> ck(
            s, varve::host_staging(4 * varve::block_unit_bytes, varve::block_unit_bytes), {}, varve::memory_sink{}, std::move(options));
        ck.save(1);
        ck.drain();
        ck.save(2);
        ck.drain();
    }
    auto const& seen = profile();
    for (std::string step : {"1", "2"})
        for (std::string phase : {"", ": leaves the tensors", ": written", ": made durable"})
            BOOST_TEST(std::count(seen.ranges.begin(), seen.ranges.end(), "save " + step + phase) == 1, "save " + step + phase);
    BOOST_TEST(std::count(seen.open.begin(), seen.open.end(), true) == 0);
    for (std::string text : {"save 1: layer_ready first", "save 2: layer_copied first", "save 2: durable"})
        BOOST_TEST(std::count(seen.marks.begin(), seen.marks.end(), text) == 1, text);
    BOOST_TEST(std::any_of(seen.marks.begin(), seen.marks.end(), [](auto const& m) { return m.starts_with("save 1: write of "); }));
}

BOOST_AUTO_TEST_CASE(what_ends_a_save_early_closes_its_ranges_too_and_one_that_never_began_leaves_a_mark) {
    InitializeInjectionNvtx2_fnptr = attach;
    varve::cuda::nvtx_observer observer;
    BOOST_REQUIRE(observer.attached());
    observer.on({.what = varve::milestone::begin, .step = 7});
    observer.on({.what = varve::milestone::staged, .step = 7});
    observer.on({.what = varve::milestone::replaced, .step = 7});
    observer.on({.what = varve::milestone::skipped, .step = 8});
    observer.on({.what = varve::milestone::written, .step = 9});
    auto const& seen = profile();
    BOOST_TEST(std::count(seen.open.begin(), seen.open.end(), true) == 0);
    for (std::string text : {"save 7: replaced", "save 8: skipped"}) BOOST_TEST(std::count(seen.marks.begin(), seen.marks.end(), text) == 1, text);
}

BOOST_AUTO_TEST_SUITE_END()
