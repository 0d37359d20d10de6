// setup.py compiles this file for the instruction set in its name.
#include "attention_backward.inc.hpp"
#include "decode_operations.inc.hpp"
#include "fused_rows.inc.hpp"
#include "head_rows.inc.hpp"
#include "kernels.hpp"
#include "sampling.inc.hpp"
#include "small_matmul.inc.hpp"

namespace fastppo {

const Kernels& kernels_avx512bf16() {
  static const Kernels kernels = {
      "avx512bf16",
      head_kernels,
      sampling_kernels,
      small_matmul_kernels,
      fused_kernels,
      attention_kernels,
      decode_kernels,
  };
  return kernels;
}

}  // namespace fastppo
