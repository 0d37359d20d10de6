// int8 weights and eight rows or fewer: vectors run along the inputs, so that every code is read and widened once, and
// reading them is what takes the time.
#pragma once

#include "small_matmul_words.inc.hpp"

namespace fastppo {
namespace {
namespace few_rows {

// Inputs whose x, of all rows, stays in the first cache while the outputs pass by.
constexpr std::int64_t dot_inputs = 1024;
// Outputs whose sums wait while that happens.
constexpr std::int64_t dot_outputs = 64;
// Cache lines ahead of the reading, in the same row and in the rows of the next outputs.
constexpr std::int64_t dot_ahead = 512;

// Add the dot products of `outputs` rows of codes with `rows` rows of x over [0, size) to sums[output][rows].
template <int rows, int outputs>
inline void add_dots(const float* x, std::int64_t x_stride, const std::int8_t* codes, std::int64_t stride,
                     std::int64_t size, float* sums) {
  Vec totals[outputs][rows];
#pragma GCC unroll 8
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) totals[o][r] = Vec::of(0);
  }
  const std::int64_t whole = size / Vec::width * Vec::width;
  for (std::int64_t k = 0; k < whole; k += Vec::width) {
    Vec inputs[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) inputs[r] = Vec::load(x + r * x_stride + k);
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) {
      const Vec weights = Vec::load(codes + o * stride + k);
      if (k % 64 == 0) __builtin_prefetch(codes + o * stride + k + dot_ahead, 0, 3);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) totals[o][r] = fma(inputs[r], weights, totals[o][r]);
    }
  }
  for (int o = 0; o < outputs; ++o) {
    for (int r = 0; r < rows; ++r) {
      float total = sum(totals[o][r]);
      for (std::int64_t k = whole; k < size; ++k) total += x[r * x_stride + k] * to_float(codes[o * stride + k]);
      sums[o * rows + r] += total;
    }
  }
}

// The outputs [begin, end) of `rows` rows.
template <int rows>
void dot_rows(const SmallMatmul& m, std::int64_t begin, std::int64_t end) {
  // As many sums as there are registers for beside their operands.
  constexpr int most = Vec::width == 16 ? 16 : 8, outputs = most / rows < 8 ? most / rows : 8;
  float sums[dot_outputs * rows];
  const auto* weight = static_cast<const std::int8_t*>(m.weight);
  for (std::int64_t n = begin; n < end; n += dot_outputs) {
    const std::int64_t count = end - n < dot_outputs ? end - n : dot_outputs;
    __builtin_memset(sums, 0, sizeof sums);
    for (std::int64_t k = 0; k < m.inputs; k += dot_inputs) {
      const std::int64_t size = m.inputs - k < dot_inputs ? m.inputs - k : dot_inputs;
      const float* x = m.x + k;
      const std::int8_t* codes = weight + n * m.weight_stride + k;
      std::int64_t o = 0;
      for (; o + outputs <= count; o += outputs) {
        add_dots<rows, outputs>(x, m.x_stride, codes + o * m.weight_stride, m.weight_stride, size, sums + o * rows);
      }
      for (; o < count; ++o) {
        add_dots<rows, 1>(x, m.x_stride, codes + o * m.weight_stride, m.weight_stride, size, sums + o * rows);
      }
    }
    for (std::int64_t o = 0; o < count; ++o) {
      const float factor = m.scale * m.row_scales[n + o];
      const float offset = m.bias == nullptr     ? 0.0f
                           : m.bias_is_bfloat16 ? to_float(static_cast<const BFloat16*>(m.bias)[n + o])
                                                : static_cast<const float*>(m.bias)[n + o];
      for (std::int64_t r = 0; r < rows; ++r) {
        float* out = m.out + r * m.out_stride + n + o;
        const float value = sums[o * rows + r] * factor + offset;
        *out = m.accumulate ? *out + value : value;
      }
    }
  }
}

void multiply_dots(const SmallMatmul& m, int thread, int num_threads) {
  const std::int64_t begin = m.outputs * thread / num_threads, end = m.outputs * (thread + 1) / num_threads;
  using Run = void (*)(const SmallMatmul&, std::int64_t, std::int64_t);
  constexpr Run runs[most_dot_rows] = {&dot_rows<1>, &dot_rows<2>, &dot_rows<3>, &dot_rows<4>,
                                       &dot_rows<5>, &dot_rows<6>, &dot_rows<7>, &dot_rows<8>};
  if (m.rows > 0) runs[m.rows - 1](m, begin, end);
}

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
