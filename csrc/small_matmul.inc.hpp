// The matmul of few rows for one instruction set; included by the file that is compiled for it.
//
// x is packed with the rows of a tile side by side, so that a vector holds one input of many rows and meets a single
// weight in every lane: the weights need no order of their own, and each lane is one sum in the order of the inputs.
#pragma once

#include "simd.hpp"
#include "small_matmul.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

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

inline bool uses_pairs(WeightType type) { return has_pairs && type == WeightType::bfloat16; }

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

// Twelve rows of weights: word k of output o lies at at + o·output_bytes + 4k, or interleaved at at + 4·(12k + o).
struct Weights {
  const unsigned char* at;
  std::int64_t output_bytes;
  bool is_interleaved;
  std::int64_t ahead_bytes;  // to what is prefetched meanwhile
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
  const std::int64_t step = is_interleaved ? 4 : weights.output_bytes;
  const unsigned char* at[pointers];
#pragma GCC unroll 4
  for (int p = 0; p < pointers; ++p) at[p] = weights.at + 3 * p * step;
  const auto multiply_word = [&](std::int64_t k) {
    const std::int64_t here = k * (is_interleaved ? 4 * tile_outputs : 4);
    V rows[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) rows[i] = V::load(x + k * lanes + i * V::width);
#pragma GCC unroll 12
    for (int o = 0; o < outputs; ++o) {
      const V weight = V::of(load_word(at[o / 3] + o % 3 * step + here));
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) {
        sums[o][i] = is_pairs ? fma_pairs(rows[i], weight, sums[o][i]) : fma(rows[i], weight, sums[o][i]);
      }
    }
  };
  constexpr std::int64_t line_words = 16;
  std::int64_t k = 0;
  for (; k + line_words <= words; k += line_words) {
    if (!is_interleaved) {
#pragma GCC unroll 12
      for (int o = 0; o < outputs; ++o) {
        __builtin_prefetch(at[o / 3] + o % 3 * step + 4 * k + weights.ahead_bytes, 0, 2);
      }
    }
    for (std::int64_t i = k; i < k + line_words; ++i) multiply_word(i);
  }
  for (; k < words; ++k) multiply_word(k);
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
    some.at = weights.at + o * (is_interleaved ? 4 : weights.output_bytes);
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

// Copy inputs [begin, end) of `count` outputs as floats, interleaved if they are so in memory, and zeros up to twelve.
template <typename T>
inline void widen(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin, std::int64_t end,
                  float* words) {
  const T* weight = static_cast<const T*>(m.weight);
  if (m.is_transposed) {
    for (std::int64_t k = begin; k < end; ++k, words += tile_outputs) {
      const T* from = weight + k * m.weight_stride + output;
      for (std::int64_t o = 0; o < tile_outputs; ++o) words[o] = o < count ? to_float(from[o]) : 0.0f;
    }
    return;
  }
  for (std::int64_t o = 0; o < tile_outputs; ++o, words += block_words) {
    const T* from = weight + (output + o) * m.weight_stride + begin;
    for (std::int64_t k = 0; k < end - begin; ++k) words[k] = o < count ? to_float(from[k]) : 0.0f;
  }
}

// The same for pairs of bfloat16; of an odd number of inputs the last is paired with zero.
inline void copy_pairs(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                       std::int64_t end, std::uint32_t* words) {
  const std::uint16_t* weight = static_cast<const std::uint16_t*>(m.weight);
  const std::int64_t output_step = m.is_transposed ? 1 : m.weight_stride;
  const std::int64_t input_step = m.is_transposed ? m.weight_stride : 1;
  for (std::int64_t o = 0; o < tile_outputs; ++o) {
    std::uint32_t* to = m.is_transposed ? words + o : words + o * block_words;
    const std::uint16_t* from = weight + (output + o) * output_step;
    for (std::int64_t k = begin; k < end; k += 2, to += m.is_transposed ? tile_outputs : 1) {
      *to = 0;
      if (o < count) *to = from[k * input_step];
      if (o < count && k + 1 < end) *to |= static_cast<std::uint32_t>(from[(k + 1) * input_step]) << 16;
    }
  }
}

inline std::int64_t bytes_of(WeightType type) {
  return type == WeightType::float32 ? 4 : type == WeightType::bfloat16 ? 2 : 1;
}

// The words of inputs [begin, end) of `count` outputs: in place where the kernel can read them so, else in `memory`.
inline Weights find_weights(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                            std::int64_t end, float* memory) {
  const bool is_pairs = uses_pairs(m.type), is_whole = !is_pairs || (end - begin) % 2 == 0;
  if (!m.is_transposed && count == tile_outputs && is_whole && (is_pairs || m.type == WeightType::float32)) {
    const std::int64_t bytes = bytes_of(m.type), row = m.weight_stride * bytes;
    const auto* at = static_cast<const unsigned char*>(m.weight) + output * row + begin * bytes;
    return {at, row, false, row * tile_outputs};
  }
  if (is_pairs) {
    copy_pairs(m, output, count, begin, end, reinterpret_cast<std::uint32_t*>(memory));
  } else if (m.type == WeightType::float32) {
    widen<float>(m, output, count, begin, end, memory);
  } else if (m.type == WeightType::bfloat16) {
    widen<BFloat16>(m, output, count, begin, end, memory);
  } else {
    widen<std::int8_t>(m, output, count, begin, end, memory);
  }
  return {reinterpret_cast<const unsigned char*>(memory), 4 * block_words, m.is_transposed, 0};
}

inline void transpose(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
#if defined(__SSE__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
  __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

// What makes outputs of the sums of up to twelve of them.
struct Finish {
  std::int64_t count;
  bool accumulate;
  float factors[tile_outputs];
  float offsets[tile_outputs];

  Finish(const SmallMatmul& m, std::int64_t output, std::int64_t count) : count(count), accumulate(m.accumulate) {
    for (std::int64_t o = 0; o < count; ++o) {
      const std::int64_t n = output + o;
      factors[o] = m.type == WeightType::int8 ? m.scale * m.row_scales[n] : m.scale;
      offsets[o] = m.bias == nullptr     ? 0.0f
                   : m.bias_is_bfloat16 ? to_float(static_cast<const BFloat16*>(m.bias)[n])
                                        : static_cast<const float*>(m.bias)[n];
    }
  }

  void write(const float* sums, float* out, std::int64_t outputs) const {
    for (std::int64_t o = 0; o < outputs; ++o) {
      const float value = sums[o] * factors[o] + offsets[o];
      out[o] = accumulate ? out[o] + value : value;
    }
  }

  // Write the outputs of `rows` rows from totals[outputs][lanes].
  void write_tile(const float* totals, std::int64_t lanes, std::int64_t rows, float* out, std::int64_t stride) const {
    float sums[4][tile_outputs];
    for (std::int64_t r = 0; r < rows; r += 4) {
      for (std::int64_t o = 0; o < tile_outputs; o += 4) transpose(totals + o * lanes + r, lanes, &sums[0][o], tile_outputs);
      for (std::int64_t i = 0; i < 4 && r + i < rows; ++i) {
        if (count == tile_outputs) {
          write(sums[i], out + (r + i) * stride, tile_outputs);
        } else {
          write(sums[i], out + (r + i) * stride, count);
        }
      }
    }
  }
};

// The outputs [output, output + count) of the rows [begin, end), which are one chunk.
inline void multiply_chunk(const SmallMatmul& m, const float* packed, std::int64_t begin, std::int64_t end,
                           std::int64_t output, std::int64_t count) {
  alignas(64) float memory[tile_outputs * block_words];
  alignas(64) float totals[tile_outputs * chunk_rows];
  const bool is_pairs = uses_pairs(m.type);
  const std::int64_t per_word = is_pairs ? 2 : 1, height = packed_words_of(m.inputs, m.type);
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
    finish.write_tile(totals + (r - begin) * tile_outputs, lanes_of(m.rows - r), rows, m.out + r * m.out_stride + output,
                      m.out_stride);
  }
}

void multiply_part(const SmallMatmul& m, const void* packed, int thread, int num_threads) {
  const std::int64_t tiles = (m.outputs + tile_outputs - 1) / tile_outputs;
  const std::int64_t first = tiles * thread / num_threads, last = tiles * (thread + 1) / num_threads;
  for (std::int64_t begin = 0; begin < m.rows; begin += chunk_rows) {
    const std::int64_t end = m.rows - begin < chunk_rows ? m.rows : begin + chunk_rows;
    for (std::int64_t tile = first; tile < last; ++tile) {
      const std::int64_t output = tile * tile_outputs, rest = m.outputs - output;
      multiply_chunk(m, static_cast<const float*>(packed), begin, end, output, rest < tile_outputs ? rest : tile_outputs);
    }
  }
}

// Write the 16 words that begin with an element of a row of which `rest` are left: zeros past its end.
inline void pack_row(const float* from, std::int64_t rest, WeightType type, float* words) {
  alignas(64) float values[2 * pack_words];
  const std::int64_t count = uses_pairs(type) ? 2 * pack_words : pack_words;
  if (rest < count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = i < rest ? from[i] : 0.0f;
    from = values;
  }
  alignas(64) BFloat16 halves[2 * pack_words];
  if (uses_pairs(type)) {
    for (std::int64_t i = 0; i < 2 * pack_words; i += Vec::width) Vec::load(from + i).store(halves + i);
    __builtin_memcpy(words, halves, sizeof halves);
  } else if (type == WeightType::bfloat16) {
    for (std::int64_t i = 0; i < pack_words; i += Vec::width) {
      Vec::load(from + i).store(halves + i);
      Vec::load(halves + i).store(words + i);
    }
  } else {
    __builtin_memcpy(words, from, sizeof(float) * pack_words);
  }
}

void pack(const SmallMatmul& m, void* packed, int thread, int num_threads) {
  const std::int64_t height = packed_words_of(m.inputs, m.type), per_word = uses_pairs(m.type) ? 2 : 1;
  const std::int64_t blocks = height / pack_words, all = (m.rows + tile_rows - 1) / tile_rows * blocks;
  alignas(64) float words[tile_rows * pack_words];
  for (std::int64_t i = all * thread / num_threads; i < all * (thread + 1) / num_threads; ++i) {
    const std::int64_t row = i / blocks * tile_rows, word = i % blocks * pack_words, lanes = lanes_of(m.rows - row);
    const float* from = m.x + row * m.x_stride + word * per_word;
    const std::int64_t rest = m.inputs - word * per_word, rows = m.rows - row < lanes ? m.rows - row : lanes;
    const bool is_ready = m.type != WeightType::bfloat16 && rows == lanes && rest >= pack_words;
    if (!is_ready) {
      for (std::int64_t r = 0; r < rows; ++r) pack_row(from + r * m.x_stride, rest, m.type, words + r * pack_words);
      __builtin_memset(words + rows * pack_words, 0, sizeof(float) * static_cast<std::size_t>((lanes - rows) * pack_words));
    }
    const float* source = is_ready ? from : words;
    const std::int64_t stride = is_ready ? m.x_stride : pack_words;
    float* to = static_cast<float*>(packed) + row * height + word * lanes;
    for (std::int64_t k = 0; k < pack_words; k += 4) {
      for (std::int64_t r = 0; r < lanes; r += 4) transpose(source + r * stride + k, stride, to + k * lanes + r, lanes);
    }
  }
}

std::int64_t packed_bytes(std::int64_t rows, std::int64_t inputs, WeightType type) {
  const std::int64_t whole = rows / tile_rows * tile_rows, lanes = rows > whole ? lanes_of(rows - whole) : 0;
  return (whole + lanes) * packed_words_of(inputs, type) * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace few_rows

constexpr SmallMatmulKernels small_matmul_kernels = {few_rows::packed_bytes, few_rows::pack, few_rows::multiply_part};

}  // namespace
}  // namespace fastppo
