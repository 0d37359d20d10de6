// Y = X Wᵀ for the few rows of a decode step, from weights that stay as torch stores them. An output is one sum in the
// order of the inputs, so a row's results depend on that row alone: not on the other rows, not on the threads.
#pragma once

#include <cstdint>

namespace fastppo {

// int8_bfloat16 is int8, not transposed, for an x that loses nothing in bfloat16: the codes lose nothing there either.
// Nibbles are four bits, never transposed; in nibbles_bfloat16 what they stand for is rounded to bfloat16.
enum class WeightType : int {
  float32 = 0,
  bfloat16 = 1,
  int8 = 2,
  int8_bfloat16 = 3,
  nibbles = 4,
  nibbles_bfloat16 = 5
};

inline bool is_int8(WeightType type) { return type == WeightType::int8 || type == WeightType::int8_bfloat16; }
inline bool is_nibbles(WeightType type) { return type == WeightType::nibbles || type == WeightType::nibbles_bfloat16; }

// What bitsandbytes' codes of four bits stand for. Blocks run on from row to row: weight i = n * inputs + k is
// table[code i] * absmax of block i / `block`. An even number of inputs, two in a byte, the first in its upper half.
struct FourBits {
  const float* table;          // (16,)
  const void* absmax;          // float, or if there is a nested table std::uint8_t
  std::int64_t block;          // even
  const float* nested_table;   // (256,); null: absmax as it is. Else absmax of block i =
  const float* nested_absmax;  // nested_table[code i] * nested_absmax[i / nested_block] + offset
  std::int64_t nested_block;
  float offset;
};

// out[m, n] = scale * sum_k x[m, k] * w[n, k] + bias[n], added to out where `accumulate`. Sums are fp32; with `rounds`
// what comes of them has no more digits than a bfloat16. All strides are in elements.
struct SmallMatmul {
  std::int64_t rows, inputs, outputs;
  const float* x;  // (rows, inputs); a bfloat16 weight meets x rounded to bfloat16, as in torch's bf16 Linear
  std::int64_t x_stride;
  const void* weight;  // (outputs, inputs), or if transposed (inputs, outputs), GPT-2's Conv1D
  std::int64_t weight_stride;
  WeightType type;
  bool is_transposed;
  const float* row_scales;  // int8 only: (outputs,), w = code * row_scale; x is not rounded
  const void* bias;         // (outputs,); null: none
  bool bias_is_bfloat16;
  float scale;
  bool accumulate;
  bool rounds;
  float* out;  // (rows, outputs)
  std::int64_t out_stride;
  FourBits four_bits;  // nibbles only
};

// What every build of small_matmul.inc.hpp offers. `packed` is a copy of x in the kernel's order, aligned to 64 bytes:
// all threads pack their share of it, meet at a barrier, and then do their parts; matmuls of the same x, rows, inputs
// and type can share it. A thread may also pack the whole for itself alone: pack(matmul, own, 0, 1), without a barrier.
struct SmallMatmulKernels {
  std::int64_t (*packed_bytes)(std::int64_t rows, std::int64_t inputs, WeightType type);
  // Reads x, x_stride, rows, inputs and type alone. inputs = 0 is allowed.
  void (*pack)(const SmallMatmul& matmul, void* packed, int thread, int num_threads);
  // A contiguous range of outputs, of all rows. No barrier inside; out is complete after the caller's.
  void (*part)(const SmallMatmul& matmul, const void* packed, int thread, int num_threads);
  // The same for nibbles, for int8 weights that are not transposed, and at most `most_dot_rows` rows: reads x as it lies.
  void (*dots)(const SmallMatmul& matmul, int thread, int num_threads);
};

constexpr std::int64_t most_dot_rows = 8;

// The whole of it, on up to `threads` threads of its own. Unless it must be row-invariant, few rows and weights of 8 and 4
// bits are summed in another order, which is faster.
void small_matmul(const SmallMatmul& matmul, bool is_row_invariant, int threads);

}  // namespace fastppo
