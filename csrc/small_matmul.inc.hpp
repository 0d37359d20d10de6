// The matmul of few rows for one instruction set; included by the file that is compiled for it.
#pragma once

#include "small_matmul_dots.inc.hpp"

namespace fastppo {
namespace {
namespace few_rows {

// The outputs [output, output + count) of the rows [begin, end), which are one chunk.
inline void multiply_chunk(const SmallMatmul& m, const float* packed, std::int64_t begin, std::int64_t end,
                           std::int64_t output, std::int64_t count) {
  alignas(64) float memory[tile_outputs * block_words];
  alignas(64) float totals[tile_outputs * chunk_rows];
  const bool is_pairs = uses_pairs(m.type);
  const std::int64_t per_word = is_pairs ? 2 : 1, height = packed_words_of(m.inputs, m.type);
  // A row of outputs is a page away from the next: without this every one of them is waited for.
  for (std::int64_t r = begin; r < end; ++r) __builtin_prefetch(m.out + r * m.out_stride + output + count - 1, 1, 2);
  std::int64_t k = 0;
  do {  // once for no inputs at all, whose sum is zero
    const std::int64_t past = k + block_words * per_word, stop = past < m.inputs ? past : m.inputs;
    const std::int64_t words = (stop - k + per_word - 1) / per_word;
    const Weights weights = find_weights(m, output, count, k, stop, memory);
    for (std::int64_t r = begin; r < end; r += tile_rows) {
      const std::int64_t lanes = lanes_of(m.rows - r);
      multiply_block(packed + r * height + k / per_word * lanes, lanes, weights, words, is_pairs, k == 0,
                     totals + (r - begin) * tile_outputs);
    }
    k = stop;
  } while (k < m.inputs);
  const Finish finish(m, output, count);
  for (std::int64_t r = begin; r < end; r += tile_rows) {
    const std::int64_t rows = end - r < tile_rows ? end - r : tile_rows;
    float* out = m.out + r * m.out_stride + output;
    finish.write_tile(totals + (r - begin) * tile_outputs, lanes_of(m.rows - r), rows, out, m.out_stride);
  }
}

void multiply_part(const SmallMatmul& m, const void* packed, int thread, int num_threads) {
  const std::int64_t tiles = (m.outputs + tile_outputs - 1) / tile_outputs;
  const std::int64_t first = tiles * thread / num_threads, last = tiles * (thread + 1) / num_threads;
  for (std::int64_t begin = 0; begin < m.rows; begin += chunk_rows) {
    const std::int64_t end = m.rows - begin < chunk_rows ? m.rows : begin + chunk_rows;
    for (std::int64_t tile = first; tile < last; ++tile) {
      const std::int64_t output = tile * tile_outputs, rest = m.outputs - output;
      const std::int64_t count = rest < tile_outputs ? rest : tile_outputs;
      multiply_chunk(m, static_cast<const float*>(packed), begin, end, output, count);
    }
  }
}

std::int64_t packed_bytes(std::int64_t rows, std::int64_t inputs, WeightType type) {
  const std::int64_t whole = rows / tile_rows * tile_rows, lanes = rows > whole ? lanes_of(rows - whole) : 0;
  return (whole + lanes) * packed_words_of(inputs, type) * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace few_rows

constexpr SmallMatmulKernels small_matmul_kernels = {few_rows::packed_bytes, few_rows::pack, few_rows::multiply_part,
                                                       few_rows::multiply_dots};

}  // namespace
}  // namespace fastppo
