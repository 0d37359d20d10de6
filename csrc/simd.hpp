// A vector of floats for the instruction set that the including file is compiled for, and the few functions on it that
// the kernels need. Everything has internal linkage and nothing of the standard library is inlined here: a function
// compiled for AVX-512 must never be the copy that the linker keeps for a processor without it.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastppo {
namespace {

// The upper half of a float. A type of its own, so that overloads tell it from an integer.
struct BFloat16 {
  std::uint16_t bits;
};

inline float bits_to_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(std::int8_t value) { return value; }
inline float to_float(BFloat16 value) { return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float value, float* at) { *at = value; }
inline void from_float(float value, BFloat16* at) {
  const std::uint32_t bits = float_to_bits(value);
  const bool is_nan = value != value;
  at->bits = static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;

  static Vec of(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* at) { return {_mm512_loadu_ps(at)}; }
  static Vec load(const BFloat16* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const std::int8_t* at) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))))};
  }
  void store(float* at) const { _mm512_storeu_ps(at, v); }
  void store(BFloat16* at) const {
#if defined(__AVX512BF16__)
    const __m256i low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), low);
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// a·b + c in one rounding.
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger; NaN where b is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// The value of `a` with the sign of `sign`, for a >= 0.
inline Vec with_sign(Vec a, Vec sign) {
  const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign.v), _mm512_set1_epi32(INT32_MIN));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a.v), bit))};
}
// a where p > 0, else 0.
inline Vec where_positive(Vec p, Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v)};
}
// a where x < limit, else (for NaN too) b.
inline Vec where_below(float limit, Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_LT_OQ), b.v, a.v)};
}
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a·2^n for whole n of -126 to 127.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Store the lanes with low <= a < high side by side, in order, and return their number; writes a whole vector.
inline int store_within(Vec a, float low, float high, float* at) {
  const __mmask16 is_above = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(low), _CMP_GE_OQ);
  const __mmask16 chosen = _mm512_mask_cmp_ps_mask(is_above, a.v, _mm512_set1_ps(high), _CMP_LT_OQ);
  _mm512_storeu_ps(at, _mm512_maskz_compress_ps(chosen, a.v));
  return __builtin_popcount(chosen);
}
// The sum and the largest of all lanes, always in the same order: halves onto each other.
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;

  static Vec of(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* at) { return {_mm256_loadu_ps(at)}; }
  static Vec load(const BFloat16* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const std::int8_t* at) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))))};
  }
  void store(float* at) const { _mm256_storeu_ps(at, v); }
  void store(BFloat16* at) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(halves));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign(Vec a, Vec sign) {
  return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
inline Vec where_positive(Vec p, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(p.v, _mm256_setzero_ps(), _CMP_GT_OQ), a.v)};
}
inline Vec where_below(float limit, Vec x, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(limit), _CMP_LT_OQ))};
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

// For each mask of eight lanes the numbers of the chosen ones, a byte each, in order.
struct Compressions {
  std::uint64_t lanes[256];
  constexpr Compressions() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, count = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask] |= static_cast<std::uint64_t>(lane) << (8 * count++);
      }
    }
  }
};
constexpr Compressions compressions;

inline int store_within(Vec a, float low, float high, float* at) {
  const __m256 is_above = _mm256_cmp_ps(a.v, _mm256_set1_ps(low), _CMP_GE_OQ);
  const __m256 is_below = _mm256_cmp_ps(a.v, _mm256_set1_ps(high), _CMP_LT_OQ);
  const int chosen = _mm256_movemask_ps(_mm256_and_ps(is_above, is_below));
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(compressions.lanes[chosen]));
  _mm256_storeu_ps(at, _mm256_permutevar8x32_ps(a.v, _mm256_cvtepu8_epi32(bytes)));
  return __builtin_popcount(static_cast<unsigned>(chosen));
}
inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

#else

// The compilers' own vectors, four at a time: every processor has such registers (SSE2, NEON). From loops over eight
// scalars the compiler did not make them, and the kernels took several times as long.
using Floats = float __attribute__((vector_size(16)));
using Bits = std::uint32_t __attribute__((vector_size(16)));

struct Vec {
  static constexpr int width = 4;
  Floats v;

  static Vec of(float x) { return {Floats{x, x, x, x}}; }
  static Vec load(const float* at) {
    Vec out;
    __builtin_memcpy(&out.v, at, sizeof out.v);
    return out;
  }
  static Vec load(const BFloat16* at) {
    return {Floats{to_float(at[0]), to_float(at[1]), to_float(at[2]), to_float(at[3])}};
  }
  static Vec load(const std::int8_t* at) {
    return {Floats{to_float(at[0]), to_float(at[1]), to_float(at[2]), to_float(at[3])}};
  }
  void store(float* at) const { __builtin_memcpy(at, &v, sizeof v); }
  void store(BFloat16* at) const {
    for (int i = 0; i < width; ++i) from_float(v[i], at + i);
  }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// In two roundings: without the instruction, one rounding would cost a call each.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec abs(Vec a) { return {reinterpret_cast<Floats>(reinterpret_cast<Bits>(a.v) & 0x7fffffffu)}; }
inline Vec with_sign(Vec a, Vec sign) {
  const Bits bit = reinterpret_cast<Bits>(sign.v) & 0x80000000u;
  return {reinterpret_cast<Floats>(reinterpret_cast<Bits>(a.v) | bit)};
}
inline Vec where_positive(Vec p, Vec a) { return {p.v > 0.0f ? a.v : Floats{}}; }
inline Vec where_below(float limit, Vec x, Vec a, Vec b) { return {x.v < limit ? a.v : b.v}; }
// Adding and taking away 1.5·2^23 leaves a whole number, for |a| < 2^22.
inline Vec round(Vec a) { return {(a.v + 12582912.0f) - 12582912.0f}; }
// The whole number n is in the lowest bits of n + 1.5·2^23; what a NaN has there makes some factor, and NaN it stays.
inline Vec scale_by_power(Vec a, Vec n) {
  const Bits biased = reinterpret_cast<Bits>(n.v + 12582912.0f) - (0x4b400000u - 127u);
  return {a.v * reinterpret_cast<Floats>(biased << 23)};
}

inline int store_within(Vec a, float low, float high, float* at) {
  const Bits chosen = (a.v >= low) & (a.v < high);
  int count = 0;
  for (int i = 0; i < Vec::width; ++i) {
    at[count] = a.v[i];
    count += static_cast<int>(chosen[i] & 1u);
  }
  return count;
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
  float best = a.v[0];
  for (int i = 1; i < Vec::width; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}

#endif

// a where x >= limit or x is NaN, else 0.
inline Vec zero_below(float limit, Vec x, Vec a) { return where_below(limit, x, Vec::of(0), a); }

}  // namespace
}  // namespace fastppo
