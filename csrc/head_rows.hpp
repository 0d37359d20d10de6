// The row operations of the language-model head, on a chunk of raw logits: statistics, gradient, and both at once for
// PPO's loss. fastppo/reference.py states the formulas; every row is one thread's, summed in a fixed order.
#pragma once

#include <cstdint>

namespace fastppo {

// z = softcap·tanh(scale·u / softcap) / temperature, without the tanh where softcap is 0.
struct Scaling {
  float logit_scale;
  float softcap;
  float inverse_temperature;
};

// Row-major (rows, vocabulary) of float or bfloat16, `stride` elements from row to row.
struct Matrix {
  void* data;
  std::int64_t stride;
  bool is_bfloat16;
};

struct HeadRows {
  std::int64_t rows;
  std::int64_t vocabulary;
  Matrix logits;
  Scaling scaling;
  const std::int64_t* labels;  // a label outside the vocabulary makes its row NaN
  // The reference's logits, for the exact KL; data is null without one.
  Matrix ref_logits;
  Scaling ref_scaling;
  int threads;
};

// One number a row each; kl and ref_logsumexps are touched only where there are reference logits. The log-sum-exp is
// a double because the gradient takes it from logits of its own size: as a float it would cost probabilities digits.
struct RowStatistics {
  float* logprobs;
  float* entropies;
  double* logsumexps;
  float* kl;
  double* ref_logsumexps;
};

// dLoss by each statistic, a float a row; null means zero.
struct RowGradients {
  const float* logprob;
  const float* entropy;
  const float* logsumexp;
  const float* kl;
};

// What PPO's clipped loss reads of each row; a null old_logprobs stands for the detached new ones, a null
// ref_logprobs for no penalty. losses are written.
struct PPOTerms {
  const float* old_logprobs;
  const float* ref_logprobs;
  const float* advantages;
  const float* weights;
  float* losses;
  float clip_low;
  float clip_high;
  float kl_coef;
  float entropy_coef;
};

// What every build of head_rows.inc.hpp offers.
struct HeadKernels {
  void (*statistics)(const HeadRows& rows, const RowStatistics& out);
  // Writes dLoss/d(raw logits), which may replace the logits in place.
  void (*gradient)(const HeadRows& rows, const RowStatistics& stats, const RowGradients& upstream, const Matrix& out);
  // Statistics, loss, and unless out.data is null the gradient, row by row while the row is in the cache.
  void (*ppo)(const HeadRows& rows, const RowStatistics& stats, const PPOTerms& terms, const Matrix& out);
  // PPO's loss and its derivative (count,) by each of `count` gathered log-probs.
  void (*ppo_loss)(std::int64_t count, const float* logprobs, const PPOTerms& terms, float* gradients);
  // (high, low) are the halves of a float each: adds `count` bfloat16 numbers, or sets them where `is_first`.
  void (*accumulate)(std::int64_t count, const std::uint16_t* addend, bool is_first, std::uint16_t* high,
                     std::uint16_t* low, int threads);
  // Rounds (high, low) to nearest bfloat16 in high.
  void (*round_halves)(std::int64_t count, std::uint16_t* high, const std::uint16_t* low, int threads);
};

}  // namespace fastppo
