#pragma once

#include <map>
#include <string>

namespace varve::tool {

/// GB/s of copies of page-locked memory to and from the first GPU, and inside it, by the names that the probe's object gives
/// them; each byte counts once. Empty where the build has no CUDA or the machine no GPU that it can use.
std::map<std::string, double> gpu_copy_rates();

}  // namespace varve::tool
