// What attention is made of, on a few queries and a chunk of keys: scores, softmax, weighted sums of values.
// A score is summed over the head in order and a weighted sum over the keys in order, however queries, blocks and
// vectors are tiled: that is why a query's bits do not depend on its neighbours.
#pragma once

#include "attention.hpp"
#include "elementary.hpp"

namespace fastppo {
namespace {

constexpr std::int64_t chunk_blocks = 4;
constexpr std::int64_t chunk_keys = chunk_blocks * cache_block;  // per step of the online softmax
constexpr float lowest_score = -1e30f;                           // finite: -inf - (-inf) is NaN

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t round_up(std::int64_t count) { return (count + cache_block - 1) / cache_block * cache_block; }

// Scores of R queries (R, head_size) with the keys of N blocks (head_size, 16) each, to `out` (R, chunk_keys).
template <int R, int N, typename T>
inline void score_blocks(const float* queries, std::int64_t stride, const T* const* keys, std::int64_t head_size,
                         float* out) {
  constexpr int per_block = static_cast<int>(cache_block) / Vec::width, count = N * per_block;
  Vec sums[R][count];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < count; ++n) sums[r][n] = Vec::of(0);
  }
  for (std::int64_t d = 0; d < head_size; ++d) {
    Vec key[count];
#pragma GCC unroll 16
    for (int n = 0; n < count; ++n) {
      key[n] = Vec::load(keys[n / per_block] + d * cache_block + n % per_block * Vec::width);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec query = Vec::of(queries[r * stride + d]);
#pragma GCC unroll 16
      for (int n = 0; n < count; ++n) sums[r][n] = fma(query, key[n], sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < count; ++n) sums[r][n].store(out + r * chunk_keys + n * Vec::width);
  }
}

// The same for any number of blocks; as many at a time as the registers hold.
template <int R, typename T>
inline void score_row_group(const float* queries, std::int64_t stride, const T* const* keys, std::int64_t blocks,
                            std::int64_t head_size, float* out) {
  constexpr int at_once = Vec::width == 16 || (Vec::width == 8 && R == 1) ? 4 : 1;
  std::int64_t b = 0;
  for (; b + at_once <= blocks; b += at_once) {
    score_blocks<R, at_once>(queries, stride, keys + b, head_size, out + b * cache_block);
  }
  if constexpr (at_once == 4) {
    if (b + 2 <= blocks) {
      score_blocks<R, 2>(queries, stride, keys + b, head_size, out + b * cache_block);
      b += 2;
    }
    if (b < blocks) score_blocks<R, 1>(queries, stride, keys + b, head_size, out + b * cache_block);
  }
}

// The same for any number of queries.
template <typename T>
inline void score(const float* queries, std::int64_t rows, std::int64_t stride, const T* const* keys,
                  std::int64_t blocks, std::int64_t head_size, float* out) {
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    score_row_group<4>(queries + r * stride, stride, keys, blocks, head_size, out + r * chunk_keys);
  }
  for (; r < rows; ++r) {
    score_row_group<1>(queries + r * stride, stride, keys, blocks, head_size, out + r * chunk_keys);
  }
}

// The terms begin..end of Σ weight·value: weights[row·row_stride + term·term_stride] times row `term` of blocks of 16.
template <typename T>
struct Terms {
  const float* weights;
  std::int64_t row_stride;
  std::int64_t term_stride;
  const T* const* values;
  std::int64_t value_stride;
  std::int64_t begin;
  std::int64_t end;
};

// Add the terms to R rows of N vectors each.
template <int R, int N, typename T>
inline void add_vectors(const Terms<T>& terms, std::int64_t column, float* out, std::int64_t stride) {
  Vec sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = Vec::load(out + r * stride + column + n * Vec::width);
  }
  for (std::int64_t j = terms.begin; j < terms.end;) {
    const T* value = terms.values[j / cache_block] + j % cache_block * terms.value_stride + column;
    const std::int64_t stop = smaller(terms.end, (j / cache_block + 1) * cache_block);
    for (; j < stop; ++j, value += terms.value_stride) {
      Vec v[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) v[n] = Vec::load(value + n * Vec::width);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec weight = Vec::of(terms.weights[r * terms.row_stride + j * terms.term_stride]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[r][n] = fma(weight, v[n], sums[r][n]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n].store(out + r * stride + column + n * Vec::width);
  }
}

// Add the terms to R rows of `size` numbers, a multiple of the vector's width.
template <int R, typename T>
inline void add_terms(const Terms<T>& terms, std::int64_t size, float* out, std::int64_t stride) {
  constexpr std::int64_t most = Vec::width == 16 ? 4 : 2;
  for (std::int64_t column = 0; column < size;) {
    const std::int64_t count = smaller(most, (size - column) / Vec::width);
    if (count == 4) add_vectors<R, 4>(terms, column, out, stride);
    if (count == 3) add_vectors<R, 3>(terms, column, out, stride);
    if (count == 2) add_vectors<R, 2>(terms, column, out, stride);
    if (count == 1) add_vectors<R, 1>(terms, column, out, stride);
    column += count * Vec::width;
  }
}

// How the scores of one query become logits. Keys are counted from the chunk's first.
struct Shaping {
  float softcap;
  float slope;         // of ALiBi; 0: none
  std::int64_t first;  // the keys that the query sees
  std::int64_t last;
};

// Turn the scores of the keys at i, i + 1, ... into logits, -inf for those that are not seen; `slopes` gets their
// derivatives.
inline Vec shape_scores(Vec scores, std::int64_t i, const Shaping& how, Vec* slopes) {
  static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  *slopes = Vec::of(1.0f);
  if (how.softcap > 0) {
    scores = tanh(scores, slopes) * Vec::of(how.softcap);
    *slopes = *slopes * Vec::of(how.softcap);
  }
  const bool is_inside = i >= how.first && i + Vec::width - 1 <= how.last;
  if (how.slope == 0 && is_inside) return scores;
  const Vec keys = Vec::load(lanes) + Vec::of(static_cast<float>(i));
  const float last = static_cast<float>(how.last);
  if (how.slope != 0) scores = fma(Vec::of(how.slope), keys - Vec::of(last), scores);
  if (is_inside) return scores;
  const Vec hidden = Vec::of(-__builtin_inff());
  const Vec ended = where_below(last + 0.5f, keys, scores, hidden);
  return where_below(static_cast<float>(how.first) - 0.5f, keys, hidden, ended);
}

// The running softmax of one query: Σ e^(logit - top) and the values' sums, times the same.
struct Softmax {
  float top;
  float total;
};

// Take the scores begin..end (multiples of 16) of a chunk into the softmax and replace them by their weights.
inline void weigh(float* scores, std::int64_t begin, std::int64_t end, const Shaping& how, Softmax* softmax,
                  float* sums, std::int64_t size) {
  Vec best = Vec::of(lowest_score), slopes;
  for (std::int64_t i = begin; i < end; i += Vec::width) {
    const Vec logits = shape_scores(Vec::load(scores + i), i, how, &slopes);
    logits.store(scores + i);
    best = max(best, logits);
  }
  const float peak = largest(best);
  if (peak > softmax->top) {
    float factor[Vec::width];
    exp(Vec::of(softmax->top - peak)).store(factor);
    for (std::int64_t d = 0; d < size; d += Vec::width) {
      (Vec::load(sums + d) * Vec::of(factor[0])).store(sums + d);
    }
    softmax->total *= factor[0];
    softmax->top = peak;
  }
  const Vec top = Vec::of(softmax->top);
  Vec total = Vec::of(0);
  for (std::int64_t i = begin; i < end; i += Vec::width) {
    const Vec weights = exp(Vec::load(scores + i) - top);
    weights.store(scores + i);
    total = total + weights;
  }
  softmax->total += sum(total);
}

// Copy the numbers of a head as floats times `factor`, and zeros up to a multiple of 16.
template <typename T>
inline void copy_head(const T* from, std::int64_t size, float factor, float* to) {
  for (std::int64_t d = 0; d < size; ++d) to[d] = factor * to_float(from[d]);
  for (std::int64_t d = size; d < round_up(size); ++d) to[d] = 0;
}

inline void load_head(const TokenHeads& from, std::int64_t token, std::int64_t head, std::int64_t size, float factor,
                      float* to) {
  const std::int64_t place = token * from.token_stride + head * from.head_stride;
  from.is_bfloat16 ? copy_head(static_cast<const BFloat16*>(from.data) + place, size, factor, to)
                   : copy_head(static_cast<const float*>(from.data) + place, size, factor, to);
}

inline float number_at(const TokenHeads& from, std::int64_t token, std::int64_t head, std::int64_t d) {
  const std::int64_t place = token * from.token_stride + head * from.head_stride + d;
  return from.is_bfloat16 ? to_float(static_cast<const BFloat16*>(from.data)[place])
                          : static_cast<const float*>(from.data)[place];
}

inline void store_head(const float* from, float factor, std::int64_t size, const TokenHeads& to, std::int64_t token,
                       std::int64_t head) {
  const std::int64_t place = token * to.token_stride + head * to.head_stride;
  for (std::int64_t d = 0; d < size; ++d) {
    to.is_bfloat16 ? from_float(factor * from[d], static_cast<BFloat16*>(to.data) + place + d)
                   : from_float(factor * from[d], static_cast<float*>(to.data) + place + d);
  }
}

}  // namespace
}  // namespace fastppo
