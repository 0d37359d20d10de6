// What lies between the matmuls of a transformer's layer, forward and backward: RMSNorm, gated activation, rotary
// positions. fastppo/reference_fused.py states the formulas. Tensors are float or bfloat16, the arithmetic is float, and
// no result depends on the number of threads.
#pragma once

#include <cstdint>

#include "head_rows.hpp"

namespace fastppo {

// y = x / √(mean(x²) + eps) · (offset + weight), of contiguous rows.
struct NormRows {
  std::int64_t rows;
  std::int64_t size;
  bool is_bfloat16;
  const void* x;
  const void* weight;  // (size,)
  float eps;
  float offset;
  float* inverse_rms;  // (rows,)
  int threads;
};

struct NormGradients {
  const void* dy;
  void* dx;
  void* dweight;             // (size,); null: not wanted
  float* partial;            // (blocks, size): the sums of so many rows each, which are added in order
  std::int64_t block_rows;
};

enum class Activation : int { silu, gelu_tanh, gelu };

// act(gate)·up, element by element.
struct GatedRows {
  std::int64_t rows;
  std::int64_t size;
  Matrix gate;
  Matrix up;
  Activation activation;
  int threads;
};

// The first `rotary` numbers of each head turned by the angles of its token, the rest copied:
// x·cos + (-x₂, x₁)·sin, for x = (x₁, x₂). Strides are in elements; the last axis of everything is contiguous.
struct Rotation {
  std::int64_t batch, heads, length, size, rotary;
  bool is_bfloat16;
  const void* x;
  std::int64_t x_stride[3];  // of batch, head, position
  void* out;
  std::int64_t out_stride[3];
  const void* cos;
  const void* sin;
  std::int64_t angle_stride[2];  // of batch, position
  bool is_transposed;            // the gradient: the transposed matrix
  int threads;
};

// What every build of fused_rows.inc.hpp offers.
struct FusedKernels {
  void (*norm)(const NormRows& rows, void* y);
  void (*norm_gradient)(const NormRows& rows, const NormGradients& out);
  void (*gated)(const GatedRows& rows, const Matrix& out);
  void (*gated_gradient)(const GatedRows& rows, const Matrix& dy, const Matrix& dgate, const Matrix& dup);
  void (*rotate)(const Rotation& rotation);
};

}  // namespace fastppo
