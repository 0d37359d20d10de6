// Where top-k and top-p cut: the value at which a running total, from the largest value down, reaches a target. Found
// without a sort, by bracketing the value and throwing away what lies outside. Included by sampling.inc.hpp.
#pragma once

#include "simd.hpp"

namespace fastppo {
namespace {

// Rows are read in blocks of this many numbers; shorter ends are filled up first.
constexpr std::int64_t draw_block = 128;

inline float infinity() { return __builtin_inff(); }

// The smallest float above x, for finite x and -inf.
inline float next_above(float x) {
  const std::uint32_t bits = float_to_bits(x);
  if (x == 0) return bits_to_float(1);
  return bits_to_float(x > 0 ? bits + 1 : bits - 1);
}

// What a value adds to the total: itself (top-p, on probabilities), or 1 (top-k, on logits).
template <bool is_mass>
inline Vec share(Vec x) {
  return is_mass ? x : Vec::of(1.0f);
}

// The total of the values >= least; count is a multiple of the width.
template <bool is_mass>
inline double total_from(const float* values, std::int64_t count, float least) {
  double total = 0;
  for (std::int64_t start = 0; start < count; start += 8 * draw_block) {  // not too long a sum in single precision
    const std::int64_t end = start + 8 * draw_block < count ? start + 8 * draw_block : count;
    Vec even = Vec::of(0), odd = even;
    std::int64_t i = start;
    for (; i + 2 * Vec::width <= end; i += 2 * Vec::width) {
      const Vec x = Vec::load(values + i), y = Vec::load(values + i + Vec::width);
      even = even + zero_below(least, x, share<is_mass>(x));
      odd = odd + zero_below(least, y, share<is_mass>(y));
    }
    if (i < end) {
      const Vec x = Vec::load(values + i);
      even = even + zero_below(least, x, share<is_mass>(x));
    }
    total += sum(even + odd);
  }
  return total;
}

// Fill up to whole vectors with -inf, which no threshold reaches; the array has room for one more vector.
inline std::int64_t pad(float* values, std::int64_t count) {
  const std::int64_t padded = (count + Vec::width - 1) / Vec::width * Vec::width;
  for (std::int64_t i = count; i < padded; ++i) values[i] = -infinity();
  return padded;
}

inline float middle_of(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c > high ? high : c;
}

struct Threshold {
  bool is_found;
  float value;         // the largest at which the total of the values >= it reaches the target
  double above;        // the total of the values > it
  std::int64_t equal;  // how many values equal it
};

// Find the threshold among `count` values, above which lies a total of `above` already; destroys the array, which has
// room for one more vector. Not found if all of them together do not reach the target.
template <bool is_mass>
inline Threshold select(float* values, std::int64_t count, double above, double target) {
  while (count > 0) {
    const std::int64_t padded = pad(values, count);
    const float pivot = middle_of(values[count / 8], values[count / 2], values[count - 1 - count / 8]);
    const double greater = above + total_from<is_mass>(values, padded, next_above(pivot));
    float low = next_above(pivot), high = infinity();
    if (greater < target) {
      const double from = above + total_from<is_mass>(values, padded, pivot);
      if (from >= target) {
        std::int64_t equal = 0;
        for (std::int64_t i = 0; i < count; ++i) equal += values[i] == pivot;
        return {true, pivot, greater, equal};
      }
      above = from;
      low = -infinity();
      high = pivot;
    }
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < padded; i += Vec::width) {
      kept += store_within(Vec::load(values + i), low, high, values + kept);
    }
    // The padding is as low as a value can be, so it may have been kept.
    count = low == -infinity() ? kept - (padded - count) : kept;
  }
  return {false, 0, above, 0};
}

struct Bracket {
  float low, high;  // low <= x < high
};

constexpr std::int64_t sample_size = 1024;

inline float largest_in(const float* sample) {
  Vec best = Vec::load(sample);
  for (std::int64_t i = Vec::width; i < sample_size; i += Vec::width) best = max(best, Vec::load(sample + i));
  return largest(best);
}

// Guess where the threshold lies, so that little more than that is gathered: from vectors spread evenly over the row,
// 2.5 standard errors wide. The guess is about the total *below* the threshold, whose many small parts a sample shows
// well; the few large ones it misses.
template <bool is_mass, typename T>
inline Bracket guess(const T* values, std::int64_t count, double below, float least, float* buffer) {
  if (count < 8 * sample_size) return {least, infinity()};
  alignas(64) float sample[sample_size];
  const std::int64_t stride = count / sample_size * Vec::width;
  for (std::int64_t i = 0; i < sample_size / Vec::width; ++i) {
    Vec::load(values + i * stride).store(sample + i * Vec::width);
  }
  const auto select_within = [&](float low, float high, double above, double target) {
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < sample_size; i += Vec::width) {
      kept += store_within(Vec::load(sample + i), low, high, buffer + kept);
    }
    return select<is_mass>(buffer, kept, above, target);
  };
  const double all = total_from<is_mass>(sample, sample_size, -infinity());
  const double tail = below * sample_size / static_cast<double>(count), head = all - tail;
  const Threshold middle = select_within(-infinity(), infinity(), 0, head);
  // With less in all of the sample than is expected below the threshold, that is probably above everything in it.
  const float value = middle.is_found ? middle.value : largest_in(sample);
  const double unit = is_mass ? value : 1, margin = 2.5 * __builtin_sqrt(unit * (is_mass || tail < head ? tail : head));
  const Threshold high = select_within(next_above(value), infinity(), 0, head - margin);
  const double from = total_from<is_mass>(sample, sample_size, value);
  float low = value;
  if (from < head + margin) {
    const Threshold lower = select_within(-infinity(), value, from, head + margin);
    low = lower.is_found ? lower.value : least;
  }
  return {low > least ? low : least, high.is_found ? next_above(high.value) : infinity()};
}

// Call f(b, start of block b) for each block of a row, the last one filled up with -inf if it is short.
template <typename T, typename F>
inline void for_blocks(const T* values, std::int64_t count, F f) {
  const std::int64_t whole = count / draw_block;
  for (std::int64_t b = 0; b < whole; ++b) f(b, values + b * draw_block);
  if (whole * draw_block == count) return;
  alignas(64) float end[draw_block];
  for (std::int64_t i = 0; i < draw_block; ++i) {
    const std::int64_t at = whole * draw_block + i;
    end[i] = at < count ? to_float(values[at]) : -infinity();
  }
  f(whole, end);
}

// Store those of a row's values that are within the bracket; return their number, and the total of those above it.
template <bool is_mass, typename T>
inline std::int64_t gather(const T* values, std::int64_t count, const float* most, Bracket in, float* out,
                           double* above) {
  std::int64_t gathered = 0;
  Vec sums = Vec::of(0);
  *above = 0;
  for_blocks(values, count, [&](std::int64_t b, const auto* block) {
    if (b % 8 == 0) {  // not too long a sum in single precision
      *above += sum(sums);
      sums = Vec::of(0);
    }
    if (most[b] < in.low) return;
    for (std::int64_t i = 0; i < draw_block; i += Vec::width) {
      const Vec x = Vec::load(block + i);
      sums = sums + zero_below(in.high, x, share<is_mass>(x));
      gathered += store_within(x, in.low, in.high, out + gathered);
    }
  });
  *above += sum(sums);
  return gathered;
}

// Find the threshold among the `count` values of a row, first where it is thought to lie. No value of block b is above
// most[b], and the threshold is known to be `least` or more. The buffer has room for the row and two vectors.
template <bool is_mass, typename T>
inline Threshold row_threshold(const T* values, std::int64_t count, const float* most, double target, float least,
                               Bracket in, float* buffer) {
  for (int attempt = 0;; ++attempt) {
    // A guess misses now and then, and once in a blue moon rounding would send it to and fro: then the whole row.
    if (attempt == 3) in = {least, infinity()};
    double above = 0;
    const std::int64_t gathered = gather<is_mass>(values, count, most, in, buffer, &above);
    if (above >= target) {
      in = {in.high, infinity()};
      continue;
    }
    const Threshold found = select<is_mass>(buffer, gathered, above, target);
    if (found.is_found || in.low <= least) return found;
    in = {least, in.low};
  }
}

}  // namespace
}  // namespace fastppo
