// How x and, where they cannot be read in place, weights become the words that small_matmul_sums.inc.hpp multiplies.
#pragma once

#include "small_matmul_nibbles.inc.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastppo {
namespace {
namespace few_rows {

// What follows copies the words of inputs [begin, end) of `count` outputs, and zeros for the rest of twelve.
template <typename T>
inline void copy_floats(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                        std::int64_t end, float* words) {
  for (std::int64_t o = 0; o < tile_outputs; ++o, words += block_words) {
    const T* from = static_cast<const T*>(m.weight) + (output + o) * m.weight_stride + begin;
    for (std::int64_t k = 0; k < end - begin; ++k) words[k] = o < count ? to_float(from[k]) : 0.0f;
  }
}

// Of an odd number of inputs the last is paired with zero.
inline void copy_pairs(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                       std::int64_t end, std::uint32_t* words) {
  const std::int64_t size = end - begin;
  __builtin_memset(words, 0, sizeof(float) * tile_outputs * block_words);
  for (std::int64_t o = 0; o < count; ++o) {
    const auto* from = static_cast<const std::uint16_t*>(m.weight) + (output + o) * m.weight_stride + begin;
    __builtin_memcpy(words + o * block_words, from, sizeof *from * static_cast<std::size_t>(size));
  }
}

// Codes as bfloat16, in which none of them loses anything.
inline void copy_code_pairs(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                            std::int64_t end, std::uint32_t* words) {
  const std::int64_t size = end - begin, whole = size / Vec::width * Vec::width;
  for (std::int64_t o = 0; o < tile_outputs; ++o, words += block_words) {
    if (o >= count) {
      __builtin_memset(words, 0, sizeof(float) * block_words);
      continue;
    }
    const std::int8_t* from = static_cast<const std::int8_t*>(m.weight) + (output + o) * m.weight_stride + begin;
    auto* to = reinterpret_cast<BFloat16*>(words);
    for (std::int64_t k = 0; k < whole; k += Vec::width) Vec::load(from + k).store(to + k);
    for (std::int64_t k = whole; k < size; ++k) from_float(from[k], to + k);
    if (size % 2 != 0) to[size].bits = 0;
  }
}

template <typename T>
inline void copy_nibbles(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                         std::int64_t end, float* words) {
  for (std::int64_t o = 0; o < tile_outputs; ++o, words += block_words) {
    if (o < count) {
      widen_nibbles(m, output + o, begin, end, reinterpret_cast<T*>(words));
    } else {
      __builtin_memset(words, 0, sizeof(float) * block_words);
    }
  }
}

template <typename T>
inline void copy_transposed(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                            std::int64_t end, float* words) {
  for (std::int64_t k = begin; k < end; ++k, words += tile_outputs) {
    const T* from = static_cast<const T*>(m.weight) + k * m.weight_stride + output;
    __builtin_prefetch(from + 2 * tile_outputs);
    for (std::int64_t o = 0; o < tile_outputs; ++o) words[o] = o < count ? to_float(from[o]) : 0.0f;
  }
}

inline void copy_transposed_pairs(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                                  std::int64_t end, std::uint32_t* words) {
  constexpr std::uint16_t zeros[tile_outputs] = {};
  const auto pair = [](std::uint16_t low, std::uint16_t high) { return low | static_cast<std::uint32_t>(high) << 16; };
  for (std::int64_t k = begin; k < end; k += 2, words += tile_outputs) {
    const auto* low = static_cast<const std::uint16_t*>(m.weight) + k * m.weight_stride + output;
    const auto* high = k + 1 < end ? low + m.weight_stride : zeros;
    __builtin_prefetch(low + 2 * tile_outputs);
    __builtin_prefetch(high + 2 * tile_outputs);
    if (count == tile_outputs) {
      for (std::int64_t o = 0; o < tile_outputs; ++o) words[o] = pair(low[o], high[o]);
    } else {
      for (std::int64_t o = 0; o < tile_outputs; ++o) words[o] = o < count ? pair(low[o], high[o]) : 0;
    }
  }
}

// Of weights that can be read in place.
inline std::int64_t bytes_of(WeightType type) {
  return type == WeightType::float32 ? 4 : 2;
}

// The words of inputs [begin, end) of `count` outputs: in place where the kernel can read them so, else in `memory`.
inline Weights find_weights(const SmallMatmul& m, std::int64_t output, std::int64_t count, std::int64_t begin,
                            std::int64_t end, float* memory) {
  const bool is_pairs = uses_pairs(m.type), is_float = m.type == WeightType::float32;
  const bool is_halves = is_pairs && m.type == WeightType::bfloat16;
  const bool is_readable = m.is_transposed ? is_float : is_float || (is_halves && (end - begin) % 2 == 0);
  if (is_readable && count == tile_outputs) {
    const std::int64_t bytes = bytes_of(m.type), row = m.weight_stride * bytes;
    const std::int64_t offset = m.is_transposed ? begin * row + output * bytes : output * row + begin * bytes;
    return {static_cast<const unsigned char*>(m.weight) + offset, m.is_transposed, row};
  }
  if (is_nibbles(m.type)) {
    (is_pairs ? &copy_nibbles<BFloat16> : &copy_nibbles<float>)(m, output, count, begin, end, memory);
  } else if (is_pairs) {
    const auto copy = is_int8(m.type) ? &copy_code_pairs : m.is_transposed ? &copy_transposed_pairs : &copy_pairs;
    copy(m, output, count, begin, end, reinterpret_cast<std::uint32_t*>(memory));
  } else if (m.type == WeightType::float32) {
    (m.is_transposed ? &copy_transposed<float> : &copy_floats<float>)(m, output, count, begin, end, memory);
  } else if (m.type == WeightType::bfloat16) {
    (m.is_transposed ? &copy_transposed<BFloat16> : &copy_floats<BFloat16>)(m, output, count, begin, end, memory);
  } else {
    (m.is_transposed ? &copy_transposed<std::int8_t> : &copy_floats<std::int8_t>)(m, output, count, begin, end, memory);
  }
  const std::int64_t stride = 4 * (m.is_transposed ? tile_outputs : block_words);
  return {reinterpret_cast<const unsigned char*>(memory), m.is_transposed, stride};
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

inline bool rounds_x(WeightType type) {
  return type == WeightType::bfloat16 || type == WeightType::nibbles_bfloat16;
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
  } else if (rounds_x(type)) {
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
    const bool is_ready = !uses_pairs(m.type) && !rounds_x(m.type) && rows == lanes && rest >= pack_words;
    if (!is_ready) {
      for (std::int64_t r = 0; r < rows; ++r) pack_row(from + r * m.x_stride, rest, m.type, words + r * pack_words);
      __builtin_memset(words + rows * pack_words, 0, 4 * static_cast<std::size_t>((lanes - rows) * pack_words));
    }
    const float* source = is_ready ? from : words;
    const std::int64_t stride = is_ready ? m.x_stride : pack_words;
    float* to = static_cast<float*>(packed) + row * height + word * lanes;
    for (std::int64_t r = 0; r < lanes; r += 4) {
      for (std::int64_t k = 0; k < pack_words; k += 4) {
        transpose(source + r * stride + k, stride, to + k * lanes + r, lanes);
      }
    }
  }
}

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
