#pragma once

#include <boost/test/unit_test.hpp>

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checking_sink.hpp"
#include "support.hpp"
#include "varve/checkpointer.hpp"
#include "varve/cuda/pinned_staging.hpp"
#include "varve/device_memory.hpp"

/// What the tests of this folder share.
namespace varve_test {

/// Whether there is a GPU to test on; where not, the running test is skipped.
inline bool have_gpu() {
    int count = 0;
    auto result = ::cudaGetDeviceCount(&count);
    if (result == cudaSuccess && count > 0) return true;
    ::cudaGetLastError();
    skip(result == cudaSuccess ? "no GPU here" : std::string("no GPU here: ") + ::cudaGetErrorString(result));
    return false;
}

/// Under compute-sanitizer each of the many small operations takes a hundred times as long.
inline bool sanitized() { return std::getenv("VARVE_TEST_SANITIZER") != nullptr; }

/// initcheck lets no copy and no memset return before its stream is through, behind a closed gate never, and loses sight of what
/// is written once a stream of the process has been captured.
inline bool initchecked() { return sanitized() && std::string_view(std::getenv("VARVE_TEST_SANITIZER")) == "initcheck"; }

/// Whether a test may hold a stream back.
inline bool can_hold_streams() {
    if (initchecked()) skip("initcheck waits for each copy, and the gate before it would open only later");
    return !initchecked();
}

/// Steps of a run that looks for mixed checkpoints.
inline std::uint64_t mixing_steps() { return sanitized() ? 4 : full() ? 60 : 15; }

inline void expect(cudaError_t result) { varve::cuda::throw_if(result, "CUDA"); }

/// Waits for what cudaMemset and cudaMemcpy, which may return before the GPU has done it, put into the default stream: streams
/// of varve's and of a test's do not wait for that one.
inline void settle() { expect(::cudaStreamSynchronize(cudaStreamLegacy)); }

struct device_bytes {
    explicit device_bytes(std::size_t n) : size(n) {
        expect(::cudaMalloc(&data, n));
        expect(::cudaMemset(data, 0, n));
        settle();
    }
    ~device_bytes() { ::cudaFree(data); }
    device_bytes(device_bytes const&) = delete;
    device_bytes& operator=(device_bytes const&) = delete;
    void* data = nullptr;
    std::size_t size;
};

struct user_stream {
    explicit user_stream(unsigned flags = cudaStreamNonBlocking) { expect(::cudaStreamCreateWithFlags(&stream, flags)); }
    ~user_stream() { ::cudaStreamDestroy(stream); }
    user_stream(user_stream const&) = delete;
    user_stream& operator=(user_stream const&) = delete;
    cudaStream_t stream = nullptr;
};

/// Holds the stream back while the door is closed.
inline void hold(cudaStream_t stream, gate& door) {
    expect(::cudaLaunchHostFunc(stream, [](void* g) { static_cast<gate*>(g)->pass(); }, &door));
}

/// Layers of bytes in GPU memory, each with a few in host memory, of odd sizes so that nothing stays aligned. Every byte
/// says the step of the last update.
class device_model {
public:
    explicit device_model(std::size_t layers = 3, std::size_t bytes = varve::block_unit_bytes + 4096 + 3) {
        for (std::size_t l = 0; l < layers; ++l) {
            auto name = "layer" + std::to_string(l);
            weights_.push_back(std::make_unique<device_bytes>(bytes + l));
            scalars_.push_back(std::make_unique<std::vector<std::byte>>(5 + l));
            varve::layer layer{name, {}};
            layer.tensors.push_back(
                {name + ".weight", varve::dtype::U8, {static_cast<std::int64_t>(bytes + l)}, weights_[l]->data, {}, varve::memory_kind::device});
            layer.tensors.push_back({name + ".scalar", varve::dtype::U8, {static_cast<std::int64_t>(5 + l)}, scalars_[l]->data(), {}});
            state_.layers.push_back(std::move(layer));
        }
    }

    varve::state& state() { return state_; }
    std::size_t layers() const { return weights_.size(); }

    /// What an update does; it takes the GPU a while where `slowly` says so, and the CPU runs ahead.
    void update(std::size_t layer, std::uint64_t step, cudaStream_t stream, bool slowly = false) {
        auto& w = *weights_[layer];
        int const writes = !slowly ? 1 : sanitized() ? 5 : 200;
        for (int i = 1; i <= writes; ++i) {
            auto value = i < writes ? 0xEE : static_cast<int>(step);
            expect(::cudaMemsetAsync(w.data, value, w.size, stream));
        }
        std::memset(scalars_[layer]->data(), static_cast<int>(step), scalars_[layer]->size());
    }

private:
    std::vector<std::unique_ptr<device_bytes>> weights_;
    std::vector<std::unique_ptr<std::vector<std::byte>>> scalars_;
    varve::state state_;
};

struct fetch_from_device {
    std::error_code operator()(std::byte* to, varve::block const& b) const noexcept {
        return varve::cuda::code_of(::cudaMemcpy(to, b.data, b.size_bytes, cudaMemcpyDefault));
    }
};
using checking_sink = checking_sink_by<fetch_from_device>;

/// Saves two steps of three to a sink that takes its time, while training goes on; every checkpoint is of one step. `update(ck, step, saves)` updates
/// each layer, and announces it where the step is saved.
template <class Staging, class Scheduling, class Update>
void never_mixes_steps(varve::state& state, Staging staging, Scheduling scheduling, std::chrono::milliseconds delay, varve::cuda::stream_order order,
                       Update update) {
    auto log = std::make_shared<checking_sink::log>();
    log->delay = delay;
    std::vector<int> expected;
    {
        varve::checkpointer<Staging, Scheduling, checking_sink> ck(state, std::move(staging), scheduling, checking_sink(state, log));
        for (std::uint64_t step = 1; step <= mixing_steps(); ++step) {
            bool const saves = step % 3 != 0;
            if (saves) ck.begin(step);
            update(ck, step, saves);
            if (!saves) continue;
            ck.seal({}, order);
            expected.push_back(static_cast<int>(step));
        }
        ck.drain();
    }
    std::lock_guard lock(log->mutex);
    BOOST_TEST(log->steps == expected, boost::test_tools::per_element());
}

/// The same with a model on one GPU, whose updates take it a while.
template <class Staging, class Scheduling>
void never_mixes_steps(Staging staging, Scheduling scheduling, cudaStream_t stream, std::chrono::milliseconds delay) {
    device_model model;
    never_mixes_steps(model.state(), std::move(staging), scheduling, delay, {stream}, [&](auto& ck, std::uint64_t step, bool saves) {
        for (std::size_t l = 0; l < model.layers(); ++l) {
            ck.before_update(l, {stream});
            model.update(l, step, stream, true);
            if (saves) ck.layer_ready(l, {stream});
        }
    });
}

/// Bytes that say where they are, the first one as that of `first`.
inline std::vector<std::byte> numbered_bytes(std::size_t size, std::size_t first = 0) {
    std::vector<std::byte> out(size);
    for (std::size_t i = 0; i < size; ++i) out[i] = static_cast<std::byte>((first + i) * 2654435761u >> 13);
    return out;
}

/// A matrix in GPU memory whose columns lie side by side, and its bytes row by row.
struct turned_matrix {
    turned_matrix(std::int64_t rows, std::int64_t columns) : memory(static_cast<std::size_t>(rows * columns) * 2) {
        std::vector<std::int16_t> values(memory.size / 2), row_major;
        for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::int16_t>(i * 31);
        for (std::int64_t c = 0; c < columns; ++c)
            for (std::int64_t r = 0; r < rows; ++r) row_major.push_back(values[static_cast<std::size_t>(r * columns + c)]);
        expect(::cudaMemcpy(memory.data, values.data(), memory.size, cudaMemcpyDefault));
        settle();
        auto const bytes = std::as_bytes(std::span(row_major));
        expected.assign(bytes.begin(), bytes.end());
        tensor = {"turned", varve::dtype::I16, {columns, rows}, memory.data, {1, columns}, varve::memory_kind::device};
    }
    device_bytes memory;
    varve::tensor tensor;
    std::vector<std::byte> expected;
};

inline void write_all(varve::device_memory& way, varve::tensor const& to, std::span<std::byte const> bytes) {
    for (std::size_t at = 0; at < bytes.size();) {
        auto const piece = way.borrow();
        auto const size = std::min(piece.size(), bytes.size() - at);
        std::memcpy(piece.data(), bytes.data() + at, size);
        way.write(to, at, piece.first(size));
        way.give_back(piece);
        at += size;
    }
}

inline std::vector<std::byte> read_all(varve::device_memory& way, std::vector<varve::tensor const*> from) {
    std::vector<std::byte> out;
    auto const reader = way.read(std::move(from));
    for (auto bytes = reader->next(); !bytes.empty(); bytes = reader->next()) out.insert(out.end(), bytes.begin(), bytes.end());
    BOOST_TEST(reader->next().empty());
    return out;
}

}  // namespace varve_test
