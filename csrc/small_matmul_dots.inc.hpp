// Weights of 8 and 4 bits and eight rows or fewer: vectors run along the inputs, so that every code is read and widened
// once, and reading them is what takes the time.
#pragma once

#include "sampling.hpp"
#include "small_matmul_finish.inc.hpp"

namespace fastppo {
namespace {
namespace few_rows {

// Inputs whose x, of all rows, stays in the first cache while the outputs pass by, and outputs whose sums wait meanwhile.
constexpr std::int64_t dot_inputs = 1024;
constexpr std::int64_t dot_outputs = 64;
// How far ahead of the reading a row of codes is asked for.
constexpr std::int64_t dot_ahead = 512;

// Of nibbles so many bytes of floats or bfloat16 are made of an output at a time: all that are multiplied together, and
// their x, stay in the first cache.
constexpr std::int64_t widened_bytes = 2048;

// The words of x and of codes that are multiplied at a time: a float each, or two bfloat16.
inline Vec load_words(const float* at) { return Vec::load(at); }
inline Vec load_words(const BFloat16* at) {
  Vec words;
  __builtin_memcpy(&words, at, sizeof words);
  return words;
}

template <typename T>
inline Vec widen_codes(const T* at, const T*) {
  return load_words(at);
}
inline Vec widen_codes(const std::int8_t* at, const float*) { return Vec::load(at); }
inline Vec widen_codes(const std::int8_t* at, const BFloat16*) {
#if defined(__AVX512BF16__)
  return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(Vec::load(at + Vec::width).v, Vec::load(at).v))};
#else
  return Vec::load(at);  // never called
#endif
}

inline Vec add_products(Vec x, Vec codes, Vec total, const float*) { return fma(x, codes, total); }
inline Vec add_products(Vec x, Vec codes, Vec total, const BFloat16*) { return fma_pairs(x, codes, total); }

// Add the dot products of `outputs` rows of codes with `rows` rows of x over [0, size) to sums[output][rows].
template <int rows, int outputs, typename T, typename Code>
inline void add_dots(const T* x, std::int64_t x_stride, const Code* codes, std::int64_t stride,
                     std::int64_t size, float* sums) {
  constexpr int width = Vec::width * static_cast<int>(sizeof(float) / sizeof(T));
  Vec totals[outputs][rows];
#pragma GCC unroll 8
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) totals[o][r] = Vec::of(0);
  }
  const std::int64_t whole = size / width * width;
  for (std::int64_t k = 0; k < whole; k += width) {
    Vec words[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) words[r] = load_words(x + r * x_stride + k);
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) {
      if (sizeof(Code) == 1 && k % 64 == 0) __builtin_prefetch(codes + o * stride + k + dot_ahead, 0, 3);
      const Vec weights = widen_codes(codes + o * stride + k, x);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) totals[o][r] = add_products(words[r], weights, totals[o][r], x);
    }
  }
  for (int o = 0; o < outputs; ++o) {
    for (int r = 0; r < rows; ++r) {
      float total = sum(totals[o][r]);
      for (std::int64_t k = whole; k < size; ++k) total += to_float(x[r * x_stride + k]) * to_float(codes[o * stride + k]);
      sums[o * rows + r] += total;
    }
  }
}

// As many outputs at a time as there are registers for the sums of, beside their operands.
constexpr int most_dots = Vec::width == 16 ? 16 : 8;
template <int rows>
constexpr int dots_together = most_dots / rows < 8 ? most_dots / rows : 8;

// Add the dot products over the inputs [k, k + size) of `outputs` outputs from n on to sums[output][rows].
template <int rows, int outputs, typename T>
inline void add_outputs(const SmallMatmul& m, const T* x, std::int64_t x_stride, std::int64_t n, std::int64_t k,
                        std::int64_t size, float* sums) {
  if (is_nibbles(m.type)) {
    constexpr std::int64_t most = widened_bytes / static_cast<std::int64_t>(sizeof(T));
    alignas(64) T widened[outputs][most];
    for (const std::int64_t end = k + size; k < end; k += most, x += most) {
      const std::int64_t part = end - k < most ? end - k : most;
      for (int o = 0; o < outputs; ++o) widen_nibbles(m, n + o, k, k + part, widened[o]);
      add_dots<rows, outputs>(x, x_stride, widened[0], most, part, sums);
    }
  } else {
    const std::int8_t* codes = static_cast<const std::int8_t*>(m.weight) + n * m.weight_stride + k;
    add_dots<rows, outputs>(x, x_stride, codes, m.weight_stride, size, sums);
  }
}

// The outputs [begin, end) of `rows` rows.
template <int rows, typename T>
void dot_rows(const SmallMatmul& m, const T* x, std::int64_t x_stride, std::int64_t begin, std::int64_t end) {
  constexpr int outputs = dots_together<rows>;
  float sums[dot_outputs * rows];
  for (std::int64_t n = begin; n < end; n += dot_outputs) {
    const std::int64_t count = end - n < dot_outputs ? end - n : dot_outputs;
    __builtin_memset(sums, 0, sizeof sums);
    for (std::int64_t k = 0; k < m.inputs; k += dot_inputs) {
      const std::int64_t size = m.inputs - k < dot_inputs ? m.inputs - k : dot_inputs;
      std::int64_t o = 0;
      for (; o + outputs <= count; o += outputs) {
        add_outputs<rows, outputs>(m, x + k, x_stride, n + o, k, size, sums + o * rows);
      }
      for (; o < count; ++o) add_outputs<rows, 1>(m, x + k, x_stride, n + o, k, size, sums + o * rows);
    }
    for (std::int64_t o = 0; o < count; ++o) {
      const Finish finish(m, n + o, 1);
      for (std::int64_t r = 0; r < rows; ++r) finish.write(sums + o * rows + r, m.out + r * m.out_stride + n + o, 1);
    }
  }
}

template <typename T>
void dot_any(const SmallMatmul& m, const T* x, std::int64_t x_stride, std::int64_t begin, std::int64_t end) {
  using Run = void (*)(const SmallMatmul&, const T*, std::int64_t, std::int64_t, std::int64_t);
  constexpr Run runs[most_dot_rows] = {&dot_rows<1, T>, &dot_rows<2, T>, &dot_rows<3, T>, &dot_rows<4, T>,
                                       &dot_rows<5, T>, &dot_rows<6, T>, &dot_rows<7, T>, &dot_rows<8, T>};
  if (m.rows > 0) runs[m.rows - 1](m, x, x_stride, begin, end);
}

void multiply_dots(const SmallMatmul& m, int thread, int num_threads) {
  const std::int64_t begin = m.outputs * thread / num_threads, end = m.outputs * (thread + 1) / num_threads;
  if (!uses_pairs(m.type)) return dot_any(m, m.x, m.x_stride, begin, end);
  auto* halves = static_cast<BFloat16*>(thread_scratch(sizeof(BFloat16) * static_cast<std::size_t>(m.rows * m.inputs)));
  const std::int64_t whole = m.inputs / Vec::width * Vec::width;
  for (std::int64_t r = 0; r < m.rows; ++r) {
    const float* from = m.x + r * m.x_stride;
    BFloat16* to = halves + r * m.inputs;
    for (std::int64_t k = 0; k < whole; k += Vec::width) Vec::load(from + k).store(to + k);
    for (std::int64_t k = whole; k < m.inputs; ++k) from_float(from[k], to + k);
  }
  dot_any(m, static_cast<const BFloat16*>(halves), m.inputs, begin, end);
}

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
