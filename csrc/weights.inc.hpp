// The weights of a row's tokens before a draw: the one pass over the logits. Included by sampling.inc.hpp.
#pragma once

#include "elementary.hpp"
#include "sampling.hpp"
#include "threshold.inc.hpp"

namespace fastppo {
namespace {

// What a thread needs to draw from a row; every array holds whole blocks and is aligned to 64 bytes.
struct Workspace {
  explicit Workspace(std::int64_t vocabulary) : blocks((vocabulary + draw_block - 1) / draw_block) {
    const std::int64_t per_block = (blocks + draw_block - 1) / draw_block * draw_block;
    const std::int64_t per_row = (blocks + 1) * draw_block;  // with room for the vectors that gathering overruns
    largest = static_cast<float*>(thread_scratch(sizeof(float) * static_cast<std::size_t>(2 * per_block + 3 * per_row)));
    sums = largest + per_block;
    weights = sums + per_block;
    logits = weights + per_row;
    buffer = logits + per_row;
  }
  std::int64_t blocks;
  float* largest;  // of the logits of each block
  float* sums;     // of the weights of each block
  float* weights;  // 2^(factor·(logit - top)) of each token that can be drawn, where they are kept
  float* logits;   // the row itself, where it is not drawn from as it comes
  float* buffer;
};

// Raw logits, of which factor·logit goes into the softmax.
template <typename T>
struct Row {
  const T* at;
  std::int64_t count;
  double factor;

  float exponent() const { return static_cast<float>(factor * 1.44269504088896340736); }  // of 2 instead of e
};

// Write the largest logit of each block and return the largest of the row.
template <typename T>
inline float find_largest(const Row<T>& row, float* each) {
  float top = -infinity();
  for_blocks(row.at, row.count, [&](std::int64_t b, const auto* block) {
    Vec even = Vec::load(block), odd = Vec::load(block + Vec::width);
    for (std::int64_t i = 2 * Vec::width; i < draw_block; i += 2 * Vec::width) {
      even = max(even, Vec::load(block + i));
      odd = max(odd, Vec::load(block + i + Vec::width));
    }
    each[b] = largest(max(even, odd));
    top = each[b] > top ? each[b] : top;
  });
  return top;
}

struct Totals {
  float top;
  double weights = 0;  // Σ w, w = 2^x, x = factor·(logit - top) / ln 2; not a number for logits that are not finite
  double powers = 0;   // Σ w x
};

// The weights of a block: their sum, Σ w x and, with `is_kept`, one by one.
template <bool is_kept, typename T>
inline void weigh_block(const T* block, Vec top, Vec exponent, float* kept, Vec* w_sum, Vec* x_sum) {
  const Vec floor = Vec::of(-1e30f);  // 0·(-inf) would be NaN
  for (std::int64_t i = 0; i < draw_block; i += Vec::width) {
    const Vec x = max(floor, (Vec::load(block + i) - top) * exponent);
    const Vec w = exp2(x);
    if (is_kept) w.store(kept + i);
    *w_sum = *w_sum + w;
    *x_sum = fma(w, x, *x_sum);
  }
}

// Weigh a row: the sum of each block, the totals and, with `is_kept`, the weights one by one.
template <bool is_kept, typename T>
inline Totals weigh(const Row<T>& row, float top, const Workspace& work) {
  const Vec highest = Vec::of(top), exponent = Vec::of(row.exponent());
  Totals totals = {top};
  for_blocks(row.at, row.count, [&](std::int64_t b, const auto* block) {
    Vec w_sum = Vec::of(0), x_sum = w_sum;
    weigh_block<is_kept>(block, highest, exponent, work.weights + b * draw_block, &w_sum, &x_sum);
    work.sums[b] = sum(w_sum);
    totals.weights += work.sums[b];
    totals.powers += sum(x_sum);
  });
  return totals;
}

// Take their weight from the tokens whose logit is below `least`; return the total of the others. A block without any of
// these gets the sum 0, and its weights are not looked at again.
template <typename T>
inline double limit(const Row<T>& row, float least, const Workspace& work) {
  double total = 0;
  for_blocks(row.at, row.count, [&](std::int64_t b, const auto* block) {
    work.sums[b] = 0;
    if (work.largest[b] < least) return;
    Vec w_sum = Vec::of(0);
    float* weights = work.weights + b * draw_block;
    for (std::int64_t i = 0; i < draw_block; i += Vec::width) {
      const Vec w = zero_below(least, Vec::load(block + i), Vec::load(weights + i));
      w.store(weights + i);
      w_sum = w_sum + w;
    }
    work.sums[b] = sum(w_sum);
    total += work.sums[b];
  });
  return total;
}

}  // namespace
}  // namespace fastppo
