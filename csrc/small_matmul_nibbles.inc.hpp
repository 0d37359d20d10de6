// Weights of four bits, turned into floats or bfloat16 a stretch at a time: a table of sixteen numbers for each block of
// weights, in which each half of a byte is looked up.
#pragma once

#include "small_matmul_sums.inc.hpp"

namespace fastppo {
namespace {
namespace few_rows {

constexpr int table_size = 16;
// How far ahead of the reading bytes are asked for.
constexpr std::int64_t nibbles_ahead = 256;

inline float absmax_of(const FourBits& bits, std::int64_t block) {
  if (bits.nested_table == nullptr) return static_cast<const float*>(bits.absmax)[block];
  const float nested = bits.nested_table[static_cast<const std::uint8_t*>(bits.absmax)[block]];
  return nested * bits.nested_absmax[block / bits.nested_block] + bits.offset;
}

// The weights of `count` / 2 bytes, the upper half of each first; `count` is even.
inline void look_up(const std::uint8_t* codes, std::int64_t count, const float* table, float* to) {
  std::int64_t k = 0;
#if defined(__AVX2__)
  const __m128i low_bits = _mm_set1_epi8(15);
#if defined(__AVX512F__)
  const __m512 numbers = _mm512_loadu_ps(table);
  const auto widen = [&](__m128i indices, float* at) {
    _mm512_storeu_ps(at, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(indices), numbers));
  };
#else
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  const auto widen_eight = [&](__m128i indices, float* at) {
    const __m256i wide = _mm256_cvtepu8_epi32(indices);
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 28));
    const __m256 lower = _mm256_permutevar8x32_ps(low, wide), upper = _mm256_permutevar8x32_ps(high, wide);
    _mm256_storeu_ps(at, _mm256_blendv_ps(lower, upper, is_high));
  };
  const auto widen = [&](__m128i indices, float* at) {
    widen_eight(indices, at);
    widen_eight(_mm_srli_si128(indices, 8), at + 8);
  };
#endif
  for (; k + 32 <= count; k += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k / 2));
    const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits), second = _mm_and_si128(bytes, low_bits);
    widen(_mm_unpacklo_epi8(first, second), to + k);
    widen(_mm_unpackhi_epi8(first, second), to + k + 16);
  }
#endif
  for (; k < count; k += 2) {
    to[k] = table[codes[k / 2] >> 4];
    to[k + 1] = table[codes[k / 2] & 15];
  }
}

// The same for a table of numbers that lose nothing in bfloat16.
inline void look_up(const std::uint8_t* codes, std::int64_t count, const float* table, BFloat16* to) {
  std::int64_t k = 0;
#if defined(__AVX512BF16__)
  const __m512i second = _mm512_loadu_si512(table), first = _mm512_srli_epi32(second, 16);
  for (; k + 32 <= count; k += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k / 2)));
    // Of an index only the lowest four bits count.
    const __m512i low = _mm512_permutexvar_epi32(_mm512_srli_epi32(bytes, 4), first);
    _mm512_storeu_si512(to + k, _mm512_or_si512(low, _mm512_permutexvar_epi32(bytes, second)));
  }
#endif
  for (; k < count; k += 2) {
    from_float(table[codes[k / 2] >> 4], to + k);
    from_float(table[codes[k / 2] & 15], to + k + 1);
  }
}

// The weights of inputs [begin, end) of one output; both are even.
template <typename T>
inline void widen_nibbles(const SmallMatmul& m, std::int64_t output, std::int64_t begin, std::int64_t end, T* to) {
  const FourBits& bits = m.four_bits;
  const std::int64_t row = output * m.inputs;
  const auto* codes = static_cast<const std::uint8_t*>(m.weight);
  for (std::int64_t at = row + begin, last = row + end; at < last;) {
    const std::int64_t block = at / bits.block, past = (block + 1) * bits.block, stop = past < last ? past : last;
    const float absmax = absmax_of(bits, block);
    alignas(64) float table[table_size];
    for (int i = 0; i < table_size; i += Vec::width) {
      Vec numbers = Vec::load(bits.table + i) * Vec::of(absmax);
      if (m.type == WeightType::nibbles_bfloat16) {
        BFloat16 halves[Vec::width];
        numbers.store(halves);
        numbers = Vec::load(halves);
      }
      numbers.store(table + i);
    }
    __builtin_prefetch(codes + at / 2 + nibbles_ahead, 0, 2);
    look_up(codes + at / 2, stop - at, table, to);
    to += stop - at;
    at = stop;
  }
}

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
