// The row operations of head_rows.hpp for one instruction set; included by the file that is compiled for it.
#pragma once

#include "head_rows.hpp"
#include "row_statistics.inc.hpp"

namespace fastppo {
namespace {

// The coefficients of a row: dLoss by log-prob, entropy, log-sum-exp and KL, and the statistics themselves.
struct RowTerms {
  float g, e, l, k;
  float logprob, entropy, kl;
  double logsumexp, ref_logsumexp;
  // No gradient: nothing reads the row, or it is nothing but -inf.
  bool is_zero() const { return (g == 0 && e == 0 && l == 0 && k == 0) || logsumexp == -__builtin_inf(); }
};

// z - lse, for a log-sum-exp in two floats: the first difference is exact where the probability is not tiny.
struct LogProb {
  explicit LogProb(double lse)
      : high(Vec::of(static_cast<float>(lse))),
        low(Vec::of(static_cast<float>(lse - static_cast<double>(static_cast<float>(lse))))) {}
  Vec of(Vec z) const { return max(Vec::of(log_floor), z - high - low); }
  Vec high, low;
};

// dLoss/dz over p_j, of a token that is not the label: -g - e (lp + H) + l + k (lp - lq - KL).
template <bool has_kl>
inline Vec per_probability(const RowTerms& t, Vec lp, Vec lq) {
  const Vec base = fma(lp, Vec::of(-t.e), Vec::of(t.l - t.g - t.e * t.entropy));
  return has_kl ? fma(lp - lq - Vec::of(t.kl), Vec::of(t.k), base) : base;
}

// The gradient may lie where the logits do, in bfloat16 too: it never overtakes what is still to be read.
template <bool has_kl, typename T, typename O>
inline void gradient_of_block(const T* u, const T* u_ref, std::int64_t count, const Factors& f, const Factors& f_ref,
                              float factor, const RowTerms& t, O* out) {
  alignas(64) float z[block_size], z_ref[block_size], slope[block_size];
  if (has_kl) scale_block(u_ref, count, f_ref, z_ref, slope);
  const std::int64_t padded = scale_block(u, count, f, z, slope);
  const LogProb logprob(t.logsumexp), ref_logprob(t.ref_logsumexp);
  const Vec scale = Vec::of(factor);
  alignas(64) O tail[Vec::width];
  for (std::int64_t i = 0; i < padded; i += Vec::width) {
    const Vec lp = logprob.of(Vec::load(z + i));
    const Vec lq = has_kl ? ref_logprob.of(Vec::load(z_ref + i)) : lp;
    Vec du = exp(lp) * per_probability<has_kl>(t, lp, lq) * scale;
    if (f.is_capped) du = du * Vec::load(slope + i);
    if (i + Vec::width <= count) {
      du.store(out + i);
    } else {
      du.store(tail);
      for (std::int64_t j = i; j < count; ++j) out[j] = tail[j - i];
    }
  }
}

template <typename T, typename O>
void gradient_of_row(const HeadRows& rows, std::int64_t row, const Factors& f, const Factors& f_ref, const RowTerms& t,
                     O* out) {
  const std::int64_t vocabulary = rows.vocabulary, label = rows.labels[row];
  if (t.is_zero()) {
    for (std::int64_t i = 0; i < vocabulary; ++i) from_float(0.0f, out + i);
    return;
  }
  const T* u = row_of<T>(rows.logits, row);
  const bool has_kl = rows.ref_logits.data != nullptr && t.k != 0;
  const T* u_ref = has_kl ? row_of<T>(rows.ref_logits, row) : nullptr;
  const bool is_valid = label >= 0 && label < vocabulary;
  // The label's own, before its logit may be overwritten. 1 - p comes from expm1, exact also where p is almost 1.
  float slope = 1.0f, ref_slope;
  if (is_valid) scaled(u, label, f, &slope);
  const float lp = t.logprob > log_floor ? t.logprob : log_floor;
  float slope_label = t.l - t.e * (lp + t.entropy);
  if (has_kl) slope_label += t.k * (lp - static_cast<float>(scaled(u_ref, is_valid ? label : 0, f_ref, &ref_slope) - t.ref_logsumexp) - t.kl);
  const float dz_label = -t.g * __builtin_expm1f(t.logprob) + __builtin_expf(lp) * slope_label;
  const float factor = rows.scaling.logit_scale * rows.scaling.inverse_temperature;
  for (std::int64_t start = 0; start < vocabulary; start += block_size) {
    const std::int64_t rest = vocabulary - start, count = rest < block_size ? rest : block_size;
    if (has_kl) {
      gradient_of_block<true>(u + start, u_ref + start, count, f, f_ref, factor, t, out + start);
    } else {
      gradient_of_block<false>(u + start, u_ref, count, f, f_ref, factor, t, out + start);
    }
  }
  if (is_valid) from_float(dz_label * factor * slope, out + label);
}

struct Coefficient {
  float loss, g;
};

// PPO's clipped loss (arXiv:1707.06347 eq. 7) with a k1 penalty, weighted, and its derivative by the log-prob.
inline Coefficient ppo_coefficient(float logprob, const PPOTerms& t, std::int64_t row) {
  const float old = t.old_logprobs ? t.old_logprobs[row] : logprob;
  const float ratio = __builtin_expf(logprob - old), advantage = t.advantages[row], weight = t.weights[row];
  const float low = 1.0f - t.clip_low, high = 1.0f + t.clip_high;
  const float within = ratio < low ? low : ratio > high ? high : ratio;
  // An advantage or a weight of 0 must not meet a ratio that has overflowed.
  const float plain = advantage == 0 ? 0.0f : -advantage * ratio, clipped = -advantage * within;
  const bool is_clipped = clipped > plain;
  Coefficient out = {is_clipped ? clipped : plain, is_clipped ? 0.0f : plain};
  if (t.ref_logprobs && t.kl_coef != 0) {
    out.loss += t.kl_coef * (logprob - t.ref_logprobs[row]);
    out.g += t.kl_coef;
  }
  return weight == 0 ? Coefficient{0.0f, 0.0f} : Coefficient{weight * out.loss, weight * out.g};
}

template <typename Real>
inline Real at_or_zero(const Real* values, std::int64_t row) {
  return values ? values[row] : Real(0);
}

template <typename T>
void statistics_rows(const HeadRows& rows, const RowStatistics& out) {
  const Factors f(rows.scaling), f_ref(rows.ref_scaling);
#pragma omp parallel for schedule(static) num_threads(rows.threads)
  for (std::int64_t row = 0; row < rows.rows; ++row) statistics_of_row<T>(rows, row, f, f_ref, out);
}

template <typename T, typename O>
void gradient_rows(const HeadRows& rows, const RowStatistics& s, const RowGradients& up, const Matrix& out) {
  const Factors f(rows.scaling), f_ref(rows.ref_scaling);
#pragma omp parallel for schedule(static) num_threads(rows.threads)
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    const RowTerms terms = {at_or_zero(up.logprob, row), at_or_zero(up.entropy, row),
                            at_or_zero(up.logsumexp, row), at_or_zero(up.kl, row),
                            s.logprobs[row], s.entropies[row], at_or_zero(s.kl, row),
                            s.logsumexps[row], at_or_zero(s.ref_logsumexps, row)};
    gradient_of_row<T>(rows, row, f, f_ref, terms, static_cast<O*>(out.data) + row * out.stride);
  }
}

template <typename T, typename O>
void ppo_rows(const HeadRows& rows, const RowStatistics& s, const PPOTerms& terms, const Matrix& out) {
  const Factors f(rows.scaling), f_ref(rows.ref_scaling);
#pragma omp parallel for schedule(static) num_threads(rows.threads)
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    statistics_of_row<T>(rows, row, f, f_ref, s);
    const Coefficient c = ppo_coefficient(s.logprobs[row], terms, row);
    const float e = -terms.entropy_coef * terms.weights[row];
    // Without a bonus the entropy is not read: 0 · inf must not reach the loss.
    terms.losses[row] = e == 0 ? c.loss : c.loss + e * s.entropies[row];
    if (out.data == nullptr) continue;
    const RowTerms t = {c.g, e, 0, 0, s.logprobs[row], s.entropies[row], 0, s.logsumexps[row], 0};
    gradient_of_row<T>(rows, row, f, f_ref, t, static_cast<O*>(out.data) + row * out.stride);
  }
}

void statistics(const HeadRows& rows, const RowStatistics& out) {
  rows.logits.is_bfloat16 ? statistics_rows<BFloat16>(rows, out) : statistics_rows<float>(rows, out);
}

void gradient(const HeadRows& rows, const RowStatistics& stats, const RowGradients& upstream, const Matrix& out) {
  const auto run = rows.logits.is_bfloat16 ? gradient_rows<BFloat16, BFloat16>
                   : out.is_bfloat16       ? gradient_rows<float, BFloat16>
                                           : gradient_rows<float, float>;
  run(rows, stats, upstream, out);
}

void ppo(const HeadRows& rows, const RowStatistics& stats, const PPOTerms& terms, const Matrix& out) {
  const auto run = rows.logits.is_bfloat16 ? ppo_rows<BFloat16, BFloat16>
                   : out.is_bfloat16       ? ppo_rows<float, BFloat16>
                                           : ppo_rows<float, float>;
  run(rows, stats, terms, out);
}

void ppo_loss(std::int64_t count, const float* logprobs, const PPOTerms& terms, float* gradients) {
  for (std::int64_t row = 0; row < count; ++row) {
    const Coefficient c = ppo_coefficient(logprobs[row], terms, row);
    terms.losses[row] = c.loss;
    gradients[row] = c.g;
  }
}

void accumulate(std::int64_t count, const std::uint16_t* addend, bool is_first, std::uint16_t* high,
                std::uint16_t* low, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t i = 0; i < count; ++i) {
    const float term = bits_to_float(static_cast<std::uint32_t>(addend[i]) << 16);
    const std::uint32_t before = (static_cast<std::uint32_t>(high[i]) << 16) | low[i];
    const std::uint32_t bits = float_to_bits(is_first ? term : bits_to_float(before) + term);
    high[i] = static_cast<std::uint16_t>(bits >> 16);
    low[i] = static_cast<std::uint16_t>(bits);
  }
}

void round_halves(std::int64_t count, std::uint16_t* high, const std::uint16_t* low, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t i = 0; i < count; ++i) {
    BFloat16 rounded;
    from_float(bits_to_float((static_cast<std::uint32_t>(high[i]) << 16) | low[i]), &rounded);
    high[i] = rounded.bits;
  }
}

constexpr HeadKernels head_kernels = {statistics, gradient, ppo, ppo_loss, accumulate, round_halves};

}  // namespace
}  // namespace fastppo
