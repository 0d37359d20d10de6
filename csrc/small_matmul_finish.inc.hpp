// How sums become outputs: scales, bias, what is there already.
#pragma once

#include "small_matmul_words.inc.hpp"

namespace fastppo {
namespace {
namespace few_rows {

inline float as_bfloat16_if(bool rounds, float value) {
  BFloat16 rounded;
  from_float(value, &rounded);
  return rounds ? to_float(rounded) : value;
}

#if defined(__AVX512F__)
// The same for sixteen. Not Vec's own rounding, which may take the smallest numbers for zero.
inline __m512 as_bfloat16_if(bool rounds, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), rounded, quiet);
  return rounds ? _mm512_castsi512_ps(_mm512_and_si512(chosen, _mm512_set1_epi32(-0x10000))) : values;
}

// Store three times four outputs of the four rows in a quarter of the vectors, of every fourth row each.
template <int quarter>
inline void store_quarter(const __m512 (&rows)[3][4], float* out, std::int64_t stride) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      _mm_storeu_ps(out + (4 * quarter + r) * stride + 4 * part, _mm512_extractf32x4_ps(rows[part][r], quarter));
    }
  }
}
#endif

// What makes outputs of the sums of up to twelve of them.
struct Finish {
  std::int64_t count;
  bool accumulate, rounds;
  float factors[tile_outputs];
  float offsets[tile_outputs];

  Finish(const SmallMatmul& m, std::int64_t output, std::int64_t count) : count(count), accumulate(m.accumulate), rounds(m.rounds) {
    for (std::int64_t o = 0; o < count; ++o) {
      const std::int64_t n = output + o;
      factors[o] = is_int8(m.type) ? m.scale * m.row_scales[n] : m.scale;
      offsets[o] = m.bias == nullptr     ? 0.0f
                   : m.bias_is_bfloat16 ? to_float(static_cast<const BFloat16*>(m.bias)[n])
                                        : static_cast<const float*>(m.bias)[n];
    }
  }

  void write(const float* sums, float* out, std::int64_t outputs) const {
    for (std::int64_t o = 0; o < outputs; ++o) {
      const float value = sums[o] * factors[o] + offsets[o];
      out[o] = as_bfloat16_if(rounds, accumulate ? out[o] + value : value);
    }
  }

#if defined(__AVX512F__)
  // Write all twelve outputs of sixteen rows, to the bit as `write` does.
  void write_sixteen(const float* totals, std::int64_t lanes, float* out, std::int64_t stride) const {
    __m512 rows[3][4];
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      __m512 values[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int o = 4 * part + i;
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(totals + o * lanes), _mm512_set1_ps(factors[o]));
        values[i] = as_bfloat16_if(rounds, _mm512_add_ps(scaled, _mm512_set1_ps(offsets[o])));
      }
      const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(values[0], values[1]));
      const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(values[0], values[1]));
      const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(values[2], values[3]));
      const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(values[2], values[3]));
      rows[part][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
      rows[part][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
      rows[part][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
      rows[part][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
    }
    store_quarter<0>(rows, out, stride);
    store_quarter<1>(rows, out, stride);
    store_quarter<2>(rows, out, stride);
    store_quarter<3>(rows, out, stride);
  }
#endif

  // Write the outputs of `rows` rows from totals[outputs][lanes].
  void write_tile(const float* totals, std::int64_t lanes, std::int64_t rows, float* out, std::int64_t stride) const {
    float sums[4][tile_outputs];
    std::int64_t r = 0;
#if defined(__AVX512F__)
    for (; count == tile_outputs && !accumulate && r + 16 <= rows; r += 16) {
      write_sixteen(totals + r, lanes, out + r * stride, stride);
    }
#endif
    for (; r < rows; r += 4) {
      for (std::int64_t o = 0; o < tile_outputs; o += 4) {
        transpose(totals + o * lanes + r, lanes, &sums[0][o], tile_outputs);
      }
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

}  // namespace few_rows
}  // namespace
}  // namespace fastppo
