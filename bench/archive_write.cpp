// Saves a state of the given size with the traditional method, as `varve bench --methods traditional` does, and says how long
// each save took: from begin to the closed file, letting the older ones go included.
//
//   bench_archive_write [--folder DIR] [--size-mb 1000] [--saves 3] [--turns]
//
// With --turns each save waits for a line on standard input, so that another program can take turns with this one.

#include <chrono>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "varve/checkpointer.hpp"
#include "varve/posix/sink.hpp"
#include "varve/scheduling/sync.hpp"
#include "varve/staging/host.hpp"
#include "varve/torch/archive.hpp"
#include "varve/torch/training_state.hpp"

int main(int argc, char** argv) {
    std::filesystem::path folder = std::filesystem::temp_directory_path() / "varve-archive-write";
    double size_mb = 1000;
    int saves = 3;
    bool turns = false;
    for (int i = 1; i < argc; ++i) {
        std::string option = argv[i];
        if (option == "--turns")
            turns = true;
        else if (option == "--folder" && i + 1 < argc)
            folder = argv[++i];
        else if (option == "--size-mb" && i + 1 < argc)
            size_mb = std::stod(argv[++i]);
        else if (option == "--saves" && i + 1 < argc)
            saves = std::stoi(argv[++i]);
        else {
            std::cerr << "unknown option " << option << '\n';
            return 2;
        }
    }
    // Layers of about 8 MB of weights, each with the two moments that Adam keeps.
    torch::nn::Sequential model;
    for (double mb = 0; mb < size_mb; mb += 3 * 4 * 1448.0 * 1448.0 / 1e6) model->push_back(torch::nn::Linear(1448, 1448));
    torch::optim::Adam optimizer(model->parameters());
    varve::libtorch::training_state training(*model, optimizer);

    varve::store_options files;
    files.durable = false;
    files.prepare = varve::prepare_mode::none;
    using checkpointer = varve::checkpointer<varve::host_staging, varve::sync, varve::posix::sink, varve::libtorch::archive>;
    {
        checkpointer ck(training.state(), varve::host_staging(varve::block_unit_bytes, varve::block_unit_bytes), varve::sync{},
                        varve::posix::sink({.writer_threads = 1, .direct = varve::posix::direct_io::never}), folder, files, {},
                        varve::libtorch::archive(training));
        std::cout << "state " << training.state().size_bytes() << " bytes" << std::endl;
        std::string line;
        for (int i = 1; i <= saves && (!turns || std::getline(std::cin, line)); ++i) {
            auto start = std::chrono::steady_clock::now();
            auto ticket = ck.save(static_cast<std::uint64_t>(i));
            std::cout << std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() << std::endl;
            ticket.written().get();
        }
    }
    std::filesystem::remove_all(folder);
}
