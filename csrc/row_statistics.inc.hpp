// Statistics of a row of logits for one instruction set; included by the file that is compiled for it.
#pragma once

#include "elementary.hpp"
#include "head_rows.hpp"

namespace fastppo {
namespace {

// Logits are scaled into a buffer of this many, small enough for the first cache, and read twice from there.
constexpr std::int64_t block_size = 1024;
// A finite floor of the running maximum: exp(-inf - -inf), of a row that begins with -inf, would be NaN.
constexpr float lowest = -1e30f;
// Log-probs are cut here before they meet a probability of 0, whose product with -inf would be NaN.
constexpr float log_floor = -1e4f;

inline float minus_infinity() { return -__builtin_inff(); }

// The two factors of a scaling: z = outer·tanh(inner·u) with a cap, z = outer·u without.
struct Factors {
  explicit Factors(const Scaling& s)
      : is_capped(s.softcap > 0),
        inner(is_capped ? s.logit_scale / s.softcap : 1.0f),
        outer((is_capped ? s.softcap : s.logit_scale) * s.inverse_temperature) {}
  bool is_capped;
  float inner;
  float outer;
};

template <typename T>
inline const T* row_of(const Matrix& matrix, std::int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

// Blocks are read two vectors at a time, which keeps two sums of each kind going.
constexpr std::int64_t stripe = 2 * Vec::width;

// Write the scaled logits of a block to `z`, filled up with -inf to whole stripes, and with a cap the derivative of the
// tanh to `slope`; return how many that are.
template <typename T>
inline std::int64_t scale_block(const T* u, std::int64_t count, const Factors& f, float* z, float* slope) {
  const Vec inner = Vec::of(f.inner), outer = Vec::of(f.outer);
  const std::int64_t padded = (count + stripe - 1) / stripe * stripe;
  for (std::int64_t i = 0; i < padded; i += Vec::width) {
    T tail[Vec::width];
    const bool is_whole = i + Vec::width <= count;
    for (std::int64_t j = i; !is_whole && j < i + Vec::width; ++j) tail[j - i] = j < count ? u[j] : T{};
    Vec x = Vec::load(is_whole ? u + i : tail);
    if (f.is_capped) {
      Vec derivative;
      x = tanh(x * inner, &derivative);
      derivative.store(slope + i);
    }
    (x * outer).store(z + i);
  }
  for (std::int64_t i = count; i < padded; ++i) z[i] = minus_infinity();
  return padded;
}

inline float largest_of(const float* z, std::int64_t count, float floor) {
  Vec even = Vec::of(floor), odd = even;
  for (std::int64_t i = 0; i < count; i += stripe) {
    even = max(even, Vec::load(z + i));
    odd = max(odd, Vec::load(z + i + Vec::width));
  }
  return largest(max(even, odd));
}

// m = max z, s = Σ exp(z - m), a = Σ exp(z - m) (z - m) and, with a reference, d = Σ exp(z - m) (z - m - z_ref + m_ref):
// each taken from its own maximum, since models may differ by a constant that would swallow their difference.
struct RowSums {
  float m = lowest;
  double s = 0, a = 0, d = 0;

  // Move the sums to a larger maximum.
  void raise(float to) {
    if (!(to > m)) return;
    const double shift = static_cast<double>(m) - to, scale = __builtin_exp(shift);
    a = scale * (a + s * shift);
    d = scale > 0 ? scale * (d + s * shift) : 0;  // of a row's beginning, where d may be infinite and counts nothing
    s *= scale;
    m = to;
  }
  double log_s() const { return __builtin_log(s); }
  double logsumexp() const { return m + log_s(); }
};

// The terms of one block. Those at the maximum, 1 each, are counted apart: next to a 1, a float has no digits left for
// the small terms, which are all that the log-prob of a confident row consists of.
struct BlockSums {
  Vec ones = Vec::of(0), rest = Vec::of(0), a = Vec::of(0);

  void add(Vec x) {
    const Vec p = exp(x), one = Vec::of(1);
    ones = ones + where_below(0, x, Vec::of(0), one);
    rest = rest + where_below(0, x, p, p - one);  // NaN stays NaN
    a = fma(p, x, a);
  }
};

inline void add_block(const float* z, std::int64_t count, RowSums* sums) {
  const Vec m = Vec::of(sums->m), floor = Vec::of(log_floor);
  BlockSums even, odd;
  for (std::int64_t i = 0; i < count; i += stripe) {
    even.add(max(floor, Vec::load(z + i) - m));
    odd.add(max(floor, Vec::load(z + i + Vec::width) - m));
  }
  sums->s += static_cast<double>(sum(even.ones + odd.ones)) + static_cast<double>(sum(even.rest + odd.rest));
  sums->a += sum(even.a + odd.a);
}

inline void add_difference(const float* z, const float* z_ref, float ref_m, std::int64_t count, RowSums* sums) {
  const Vec m = Vec::of(sums->m), m_ref = Vec::of(ref_m);
  Vec d = Vec::of(0);
  for (std::int64_t i = 0; i < count; i += Vec::width) {
    const Vec here = Vec::load(z + i) - m;
    const Vec p = exp(here);
    d = d + where_positive(p, p * (here - (Vec::load(z_ref + i) - m_ref)));
  }
  sums->d += sum(d);
}

template <typename T>
inline RowSums row_sums(const T* u, std::int64_t vocabulary, const Factors& f, const T* u_ref, const Factors& f_ref,
                        float ref_m) {
  alignas(64) float z[block_size], z_ref[block_size], slope[block_size];
  RowSums sums;
  for (std::int64_t start = 0; start < vocabulary; start += block_size) {
    const std::int64_t rest = vocabulary - start, wanted = rest < block_size ? rest : block_size;
    const std::int64_t count = scale_block(u + start, wanted, f, z, slope);
    sums.raise(largest_of(z, count, lowest));
    add_block(z, count, &sums);
    if (u_ref != nullptr) {
      scale_block(u_ref + start, wanted, f_ref, z_ref, slope);
      add_difference(z, z_ref, ref_m, count, &sums);
    }
  }
  return sums;
}

// One scaled logit and, with a cap, the derivative of its tanh: by the vector functions, so that a label's logit is to
// the last bit what it is among the others.
template <typename T>
inline float scaled(const T* u, std::int64_t at, const Factors& f, float* slope) {
  Vec x = Vec::of(to_float(u[at])), derivative = Vec::of(1.0f);
  if (f.is_capped) x = tanh(x * Vec::of(f.inner), &derivative);
  float lanes[Vec::width];
  derivative.store(lanes);
  *slope = lanes[0];
  (x * Vec::of(f.outer)).store(lanes);
  return lanes[0];
}

template <typename T>
void statistics_of_row(const HeadRows& rows, std::int64_t row, const Factors& f, const Factors& f_ref,
                       const RowStatistics& out) {
  const T* u = row_of<T>(rows.logits, row);
  const T* u_ref = rows.ref_logits.data ? row_of<T>(rows.ref_logits, row) : nullptr;
  const RowSums ref = u_ref ? row_sums<T>(u_ref, rows.vocabulary, f_ref, nullptr, f_ref, 0) : RowSums();
  const RowSums sums = row_sums(u, rows.vocabulary, f, u_ref, f_ref, ref.m);
  const bool is_empty = sums.s == 0;  // nothing but -inf: log-prob -inf and entropy 0 by definition
  const std::int64_t label = rows.labels[row];
  const bool is_valid = label >= 0 && label < rows.vocabulary;
  const double log_s = sums.log_s();
  float slope;
  const double shifted = is_valid ? static_cast<double>(scaled(u, label, f, &slope)) - sums.m : __builtin_nan("");
  out.logprobs[row] = is_valid && is_empty ? minus_infinity() : static_cast<float>(shifted - log_s);
  out.entropies[row] = is_empty ? 0.0f : static_cast<float>(log_s - sums.a / sums.s);
  out.logsumexps[row] = sums.m + log_s;
  if (u_ref == nullptr) return;
  out.ref_logsumexps[row] = ref.logsumexp();
  out.kl[row] = is_empty ? 0.0f : static_cast<float>(sums.d / sums.s - log_s + ref.log_s());
}

}  // namespace
}  // namespace fastppo
