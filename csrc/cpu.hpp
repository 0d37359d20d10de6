// The choice among the instruction sets that the kernels are built for.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastppo {

// The names of what was built and runs on this processor, the slowest first.
std::vector<std::string> available_isas();

// The kernels in use: the fastest available unless use_isa named others.
const Kernels& kernels();

// Choose by name; returns false, and changes nothing, if that is not available here.
bool use_isa(const std::string& name);

}  // namespace fastppo
