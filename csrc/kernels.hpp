// What each instruction set's build of the kernels offers. No headers of the standard library's templates here: the
// files compiled for one instruction set must not instantiate functions that the rest of the program shares.
#pragma once

#include "attention.hpp"
#include "decode_operations.hpp"
#include "fused_rows.hpp"
#include "head_rows.hpp"
#include "sampling.hpp"
#include "small_matmul.hpp"

namespace fastppo {

struct Kernels {
  const char* isa;
  HeadKernels head;
  SamplingKernels sampling;
  SmallMatmulKernels small_matmul;
  FusedKernels fused;
  AttentionKernels attention;
  DecodeKernels decode;
};

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();

}  // namespace fastppo
