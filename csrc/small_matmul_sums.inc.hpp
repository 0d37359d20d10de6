// The sums of twelve outputs of a few rows for one instruction set. Included by small_matmul.inc.hpp.
//
// x is packed with the rows of a tile side by side, so that a vector holds one input of many rows and meets a single
// weight in every lane: the weights need no order of their own, and each lane is one sum in the order of the inputs.
#pragma once

#include "simd.hpp"
#include "small_matmul.hpp"

namespace fastppo {
namespace {
namespace few_rows {

// 12 outputs at a time: with two vectors of rows each, 24 sums are as many as 32 registers hold beside their operands.
constexpr std::int64_t tile_outputs = 12;
constexpr std::int64_t tile_rows = 32;
// Of the tiles that share one reading of the weights from memory.
constexpr std::int64_t chunk_rows = 64;
// Inputs, or pairs of them, that are summed in registers before they join the total. The sums of shorter stretches
// also lose fewer digits.
constexpr std::int64_t block_words = 384;
constexpr std::int64_t pack_words = 16;

#if defined(__AVX512BF16__)
// A word of packed x, and of a weight read in place, is then two bfloat16 that one instruction multiplies and adds.
constexpr bool has_pairs = true;
#else
constexpr bool has_pairs = false;
#endif

inline bool uses_pairs(WeightType type) {
  return has_pairs && (type == WeightType::bfloat16 || type == WeightType::int8_bfloat16 ||
                       type == WeightType::nibbles_bfloat16);
}

inline std::int64_t words_of(std::int64_t inputs, WeightType type) {
  return uses_pairs(type) ? (inputs + 1) / 2 : inputs;
}

inline std::int64_t packed_words_of(std::int64_t inputs, WeightType type) {
  return (words_of(inputs, type) + pack_words - 1) / pack_words * pack_words;
}

// The rows of the tile that has `rest` rows left to it, padding included.
inline std::int64_t lanes_of(std::int64_t rest) { return rest > 16 ? tile_rows : rest > 8 ? 16 : 8; }

#if defined(__AVX512F__)
// For eight rows or fewer.
struct Narrow {
  static constexpr int width = 8;
  __m256 v;

  static Narrow of(float x) { return {_mm256_set1_ps(x)}; }
  static Narrow load(const float* at) { return {_mm256_loadu_ps(at)}; }
  void store(float* at) const { _mm256_storeu_ps(at, v); }
};
inline Narrow operator+(Narrow a, Narrow b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Narrow fma(Narrow a, Narrow b, Narrow c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
constexpr int most_sums = 24;
#else
using Narrow = Vec;
constexpr int most_sums = 12;
#endif

#if defined(__AVX512BF16__)
inline Vec fma_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
inline Narrow fma_pairs(Narrow a, Narrow b, Narrow c) {
  return {_mm256_dpbf16_ps(c.v, reinterpret_cast<__m256bh>(a.v), reinterpret_cast<__m256bh>(b.v))};
}
#else
template <typename V>
inline V fma_pairs(V, V, V c) {
  return c;  // never called
}
#endif

// The words of twelve outputs: from one output to the next 4 bytes where they are interleaved, else 4 from one input to
// the next.
struct Weights {
  const unsigned char* at;
  bool is_interleaved;
  std::int64_t stride;  // bytes, of the other axis
};

inline float load_word(const unsigned char* at) {
  float word;
  __builtin_memcpy(&word, at, sizeof word);
  return word;
}

// Sum `words` words into totals[outputs][lanes]; add there unless these are the first.
template <bool is_pairs, bool is_interleaved, typename V, int vectors, int outputs>
inline void multiply(const float* x, std::int64_t lanes, const Weights& weights, std::int64_t words, bool is_first,
                     float* totals) {
  V sums[outputs][vectors];
#pragma GCC unroll 12
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) sums[o][i] = V::of(0);
  }
  // Of every three outputs one has a pointer: the others are where an address with a scaled index reaches.
  constexpr int pointers = (outputs + 2) / 3;
  const std::int64_t step = is_interleaved ? 4 : weights.stride, input_step = is_interleaved ? weights.stride : 4;
  const unsigned char* at[pointers];
#pragma GCC unroll 4
  for (int p = 0; p < pointers; ++p) at[p] = weights.at + 3 * p * step;
  const auto multiply_word = [&](std::int64_t k, const unsigned char* const* from, std::int64_t step,
                                 std::int64_t here) {
    V rows[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) rows[i] = V::load(x + k * lanes + i * V::width);
#pragma GCC unroll 12
    for (int o = 0; o < outputs; ++o) {
      const V weight = V::of(load_word(from[o / 3] + o % 3 * step + here));
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) {
        sums[o][i] = is_pairs ? fma_pairs(rows[i], weight, sums[o][i]) : fma(rows[i], weight, sums[o][i]);
      }
    }
  };
  std::int64_t k = 0;
  if (is_interleaved) {
    for (; k < words; ++k) {
      // A line from each input's row, which no processor foresees: soon those of this tile, later those of the next.
      __builtin_prefetch(at[0] + (k + 8) * input_step, 0, 3);
      __builtin_prefetch(at[0] + k * input_step + 8 * tile_outputs, 0, 2);
      multiply_word(k, at, step, k * input_step);
    }
  }
  // Lines at such distances share a set of the first cache, which holds eight of them.
  const bool is_crowded = outputs > 8 && step % 4096 == 0;
  alignas(64) unsigned char lines[outputs][64];
  const unsigned char* line_at[pointers];
#pragma GCC unroll 4
  for (int p = 0; p < pointers; ++p) line_at[p] = lines[3 * p];
  constexpr std::int64_t line_words = 16;
  for (; k + line_words <= words; k += line_words) {
#pragma GCC unroll 12
    for (int o = 0; o < outputs; ++o) {
      const unsigned char* line = at[o / 3] + o % 3 * step + 4 * k;
      __builtin_prefetch(line + tile_outputs * step, 0, 2);
      if (is_crowded) __builtin_memcpy(lines[o], line, sizeof lines[o]);
    }
    if (is_crowded) {
      for (std::int64_t i = 0; i < line_words; ++i) multiply_word(k + i, line_at, sizeof lines[0], 4 * i);
    } else {
      for (std::int64_t i = k; i < k + line_words; ++i) multiply_word(i, at, step, 4 * i);
    }
  }
  for (; k < words; ++k) multiply_word(k, at, step, 4 * k);
#pragma GCC unroll 12
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      float* total = totals + o * lanes + i * V::width;
      (is_first ? sums[o][i] : V::load(total) + sums[o][i]).store(total);
    }
  }
}

template <bool is_pairs, bool is_interleaved, typename V, int vectors>
inline void multiply_lanes(const float* x, std::int64_t lanes, const Weights& weights, std::int64_t words,
                           bool is_first, float* totals) {
  constexpr int most = most_sums / vectors;
  constexpr int outputs = most < tile_outputs ? most : static_cast<int>(tile_outputs);
  Weights some = weights;
  for (std::int64_t o = 0; o < tile_outputs; o += outputs) {
    some.at = weights.at + o * (is_interleaved ? 4 : weights.stride);
    for (std::int64_t r = 0; r < lanes; r += vectors * V::width) {
      multiply<is_pairs, is_interleaved, V, vectors, outputs>(x + r, lanes, some, words, is_first,
                                                              totals + o * lanes + r);
    }
  }
}

template <bool is_pairs, bool is_interleaved>
inline void multiply_tile(const float* x, std::int64_t lanes, const Weights& weights, std::int64_t words,
                          bool is_first, float* totals) {
  constexpr int half = 16 / Vec::width < 4 ? 16 / Vec::width : 4, whole = 32 / Vec::width < 4 ? 32 / Vec::width : 4;
  const auto run = lanes == tile_rows ? &multiply_lanes<is_pairs, is_interleaved, Vec, whole>
                   : lanes == 16      ? &multiply_lanes<is_pairs, is_interleaved, Vec, half>
                                      : &multiply_lanes<is_pairs, is_interleaved, Narrow, 8 / Narrow::width>;
  run(x, lanes, weights, words, is_first, totals);
}

inline void multiply_block(const float* x, std::int64_t lanes, const Weights& weights, std::int64_t words,
                           bool is_pairs, bool is_first, float* totals) {
  if (is_pairs && has_pairs) {
    const auto run = weights.is_interleaved ? &multiply_tile<has_pairs, true> : &multiply_tile<has_pairs, false>;
    run(x, lanes, weights, words, is_first, totals);
  } else {
    const auto run = weights.is_interleaved ? &multiply_tile<false, true> : &multiply_tile<false, false>;
    run(x, lanes, weights, words, is_first, totals);
  }
}

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
