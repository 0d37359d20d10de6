// exp, exp2 and tanh of a vector.
#pragma once

#include "simd.hpp"

namespace fastppo {
namespace {

// e^x for x <= 88, within 2 units in the last place, NaN for NaN; 0 where it would be below the smallest normal float,
// since arithmetic on the smaller ones is slow on many processors. Source of the polynomial: Cephes, expf.
constexpr float exp_floor = -87.3f;

inline Vec exp(Vec x) {
  const Vec asked = x;
  x = max(Vec::of(exp_floor), x);
  const Vec n = round(x * Vec::of(1.44269504088896341f));
  Vec r = fma(n, Vec::of(-0.693359375f), x);
  r = fma(n, Vec::of(2.12194440e-4f), r);
  Vec p = Vec::of(1.9875691500e-4f);
  p = fma(p, r, Vec::of(1.3981999507e-3f));
  p = fma(p, r, Vec::of(8.3334519073e-3f));
  p = fma(p, r, Vec::of(4.1665795894e-2f));
  p = fma(p, r, Vec::of(1.6666665459e-1f));
  p = fma(p, r, Vec::of(5.0000001201e-1f));
  return zero_below(exp_floor, asked, scale_by_power(fma(p * r, r, r) + Vec::of(1.0f), n));
}

// 2^x within 2 units in the last place, for x <= 127; 1 for 0, NaN for NaN, and 0 below the smallest normal float.
// The polynomial is the minimax one of degree 5 on [-1/2, 1/2].
inline Vec exp2(Vec x) {
  const Vec asked = x;
  x = max(Vec::of(-126.0f), x);
  const Vec n = round(x);
  const Vec r = x - n;
  Vec p = Vec::of(1.3276471993e-3f);
  p = fma(p, r, Vec::of(9.6755413344e-3f));
  p = fma(p, r, Vec::of(5.5507132735e-2f));
  p = fma(p, r, Vec::of(2.4022119724e-1f));
  p = fma(p, r, Vec::of(6.9314696706e-1f));
  p = fma(p, r, Vec::of(1.0f));
  return where_below(-126.0f, asked, Vec::of(0), scale_by_power(p, n));
}

// tanh(x), and 1 - tanh²(x) in `slope` without cancellation. By e^(-2|x|), which cannot overflow; near 0, where the
// difference of two numbers near 1 would cost digits, by the polynomial of Cephes' tanhf.
inline Vec tanh(Vec x, Vec* slope) {
  const Vec one = Vec::of(1.0f), size = abs(x);
  const Vec decay = exp(Vec::of(-2.0f) * size);
  const Vec inverse = one / (one + decay);
  *slope = Vec::of(4.0f) * decay * inverse * inverse;
  const Vec s = x * x;
  Vec p = Vec::of(-5.70498872745e-3f);
  p = fma(p, s, Vec::of(2.06390887954e-2f));
  p = fma(p, s, Vec::of(-5.37397155531e-2f));
  p = fma(p, s, Vec::of(1.33314422036e-1f));
  p = fma(p, s, Vec::of(-3.33332819422e-1f));
  const Vec large = fma(Vec::of(-2.0f) * decay, inverse, one);
  return where_below(0.625f, size, fma(p * s, x, x), with_sign(large, x));
}

inline Vec tanh(Vec x) {
  Vec slope;
  return tanh(x, &slope);
}

}  // namespace
}  // namespace fastppo
