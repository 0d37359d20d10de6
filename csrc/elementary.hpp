// exp, exp2, tanh, the logistic function and the normal distribution's, of a vector.
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

// 1 / (1 + e^(-x)), by e^(-|x|), which cannot overflow.
inline Vec logistic(Vec x) {
  const Vec decay = exp(Vec::of(0) - abs(x)), inverse = Vec::of(1.0f) / (Vec::of(1.0f) + decay);
  return where_below(0.0f, x, decay * inverse, inverse);
}

// The distribution function of the normal distribution, and its density. Source of the polynomials: Cephes, ndtrf.c:
// erf up to 1, and erfc, which keeps its digits in the tail, beyond.
inline Vec normal_distribution(Vec x, Vec* density) {
  const Vec t = x * Vec::of(0.70710678118654752f), size = abs(t), s = t * t;
  const Vec decay = exp(Vec::of(0) - s);
  *density = Vec::of(0.39894228040143268f) * decay;
  constexpr float near[] = {7.853861353153693e-5f, -8.010193625184903e-4f, 5.188327685732524e-3f,
                            -2.685381193529856e-2f, 1.128358514861418e-1f, -3.761262582423300e-1f,
                            1.128379165726710f};
  constexpr float middle[] = {2.326819970068386e-2f, -1.387039388740657e-1f, 3.687424674597105e-1f,
                              -5.824733027278666e-1f, 6.210004621745983e-1f, -4.944515323274145e-1f,
                              3.404879937665872e-1f, -2.741127028184656e-1f, 5.638259427386472e-1f};
  constexpr float far[] = {-1.047766399936249e1f, 1.297719955372516e1f, -7.495518717768503f,
                           2.921019019210786f, -1.015265279202700f, 4.218463358204948e-1f,
                           -2.820767439740514e-1f, 5.641895067754075e-1f};
  const Vec q = Vec::of(1.0f) / max(Vec::of(1.0f), size), r = q * q;
  Vec p = Vec::of(near[0]), m = Vec::of(middle[0]), f = Vec::of(far[0]);
  for (int i = 1; i < 7; ++i) p = fma(p, s, Vec::of(near[i]));
  for (int i = 1; i < 9; ++i) m = fma(m, r, Vec::of(middle[i]));
  for (int i = 1; i < 8; ++i) f = fma(f, r, Vec::of(far[i]));
  const Vec tail = Vec::of(0.5f) * decay * q * where_below(2.0f, size, m, f);
  const Vec beyond = where_below(0.0f, x, tail, Vec::of(1.0f) - tail);
  return where_below(1.0f, size, fma(Vec::of(0.5f) * t, p, Vec::of(0.5f)), beyond);
}

}  // namespace
}  // namespace fastppo
