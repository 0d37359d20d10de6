#include "cpu.hpp"

#include <atomic>

namespace fastppo {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found = {&kernels_generic()};
#if defined(FASTPPO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kernels_avx512());
      if (__builtin_cpu_supports("avx512bf16")) {
        found.push_back(&kernels_avx512bf16());
      }
    }
  }
#endif
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> choice{available().back()};
  return choice;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) {
    names.emplace_back(kernels->isa);
  }
  return names;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_isa(const std::string& name) {
  for (const Kernels* kernels : available()) {
    if (kernels->isa == name) {
      chosen().store(kernels);
      return true;
    }
  }
  return false;
}

}  // namespace fastppo
