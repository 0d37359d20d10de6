// The operations of fused_rows.hpp for one instruction set; included by the file that is compiled for it.
#pragma once

#include "elementary.hpp"
#include "fused_rows.hpp"

namespace fastppo {
namespace {
namespace fused {

// Below this many elements, waking the other threads costs more than they save.
constexpr std::int64_t serial_elements = 8192;

// A contiguous row, read and written a vector at a time; past its end are zeros, and nothing is written.
template <typename T>
struct Row {
  T* at;
  std::int64_t count;

  Vec load(std::int64_t i) const {
    if (i + Vec::width <= count) return Vec::load(at + i);
    T tail[Vec::width] = {};
    for (std::int64_t j = i; j < count; ++j) tail[j - i] = at[j];
    return Vec::load(tail);
  }
  void store(std::int64_t i, Vec value) const {
    if (i + Vec::width <= count) return value.store(at + i);
    T tail[Vec::width];
    value.store(tail);
    for (std::int64_t j = i; j < count; ++j) at[j] = tail[j - i];
  }
};

// Kernels store into the rows that they were given to write only.
template <typename T>
inline Row<T> row_at(const void* data, std::int64_t start, std::int64_t count) {
  return {const_cast<T*>(static_cast<const T*>(data)) + start, count};
}

// Σ term(i) over the vectors of a row, as four sums side by side: one would wait for each of its additions.
template <typename Term>
inline float sum_over(std::int64_t count, Term term) {
  Vec total[4] = {Vec::of(0), Vec::of(0), Vec::of(0), Vec::of(0)};
  std::int64_t i = 0;
  for (; i + 4 * Vec::width <= count; i += 4 * Vec::width) {
    for (int j = 0; j < 4; ++j) total[j] = total[j] + term(i + j * Vec::width);
  }
  for (; i < count; i += Vec::width) total[0] = total[0] + term(i);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <typename T>
void norm_rows(const NormRows& rows, void* y) {
  const std::int64_t size = rows.size;
  const Row<T> weight = row_at<T>(rows.weight, 0, size);
#pragma omp parallel for schedule(static) num_threads(rows.threads) if (rows.rows * size > serial_elements)
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    const Row<T> x = row_at<T>(rows.x, row * size, size);
    const Row<T> out = row_at<T>(y, row * size, size);
    const float squares = sum_over(size, [&](std::int64_t i) { return x.load(i) * x.load(i); });
    const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + rows.eps);
    rows.inverse_rms[row] = inverse;
    for (std::int64_t i = 0; i < size; i += Vec::width) {
      out.store(i, x.load(i) * Vec::of(inverse) * (Vec::of(rows.offset) + weight.load(i)));
    }
  }
}

// dx = (w·dy - x̂·mean(w·dy·x̂)) / rms of rows [start, end), and Σ dy·x̂ over them in `sums` unless that is null.
template <typename T>
void norm_gradient_block(const NormRows& rows, const NormGradients& g, std::int64_t start, std::int64_t end,
                         float* sums) {
  const std::int64_t size = rows.size;
  const Row<T> weight = row_at<T>(rows.weight, 0, size);
  const Vec offset = Vec::of(rows.offset);
  const Row<float> total = {sums, size};
  for (std::int64_t i = 0; sums != nullptr && i < size; ++i) sums[i] = 0;
  for (std::int64_t row = start; row < end; ++row) {
    const Row<T> x = row_at<T>(rows.x, row * size, size), dy = row_at<T>(g.dy, row * size, size);
    const Row<T> dx = row_at<T>(g.dx, row * size, size);
    const float inverse = rows.inverse_rms[row];
    const float dot = sum_over(size, [&](std::int64_t i) { return dy.load(i) * (offset + weight.load(i)) * x.load(i); });
    const Vec scale = Vec::of(inverse);
    const Vec pull = Vec::of(dot * inverse * inverse / static_cast<float>(size));
    for (std::int64_t i = 0; i < size; i += Vec::width) {
      const Vec upstream = dy.load(i), here = x.load(i);
      dx.store(i, scale * (upstream * (offset + weight.load(i)) - here * pull));
      if (sums != nullptr) total.store(i, fma(upstream, here * scale, total.load(i)));
    }
  }
}

template <typename T>
void norm_gradient_rows(const NormRows& rows, const NormGradients& g) {
  const std::int64_t blocks = (rows.rows + g.block_rows - 1) / g.block_rows;
#pragma omp parallel for schedule(static) num_threads(rows.threads) if (rows.rows * rows.size > serial_elements)
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t start = block * g.block_rows, rest = rows.rows - start;
    float* sums = g.dweight == nullptr ? nullptr : g.partial + block * rows.size;
    norm_gradient_block<T>(rows, g, start, start + (rest < g.block_rows ? rest : g.block_rows), sums);
  }
  if (g.dweight == nullptr) return;
  const Row<T> dweight = row_at<T>(g.dweight, 0, rows.size);
  for (std::int64_t i = 0; i < rows.size; i += Vec::width) {
    Vec total = Vec::of(0);
    for (std::int64_t block = 0; block < blocks; ++block) {
      total = total + row_at<float>(g.partial, block * rows.size, rows.size).load(i);
    }
    dweight.store(i, total);
  }
}

// The activation and its derivative.
template <Activation activation>
inline Vec activate(Vec x, Vec* slope) {
  const Vec half = Vec::of(0.5f), one = Vec::of(1.0f);
  if (activation == Activation::silu) {
    const Vec s = logistic(x);
    *slope = fma(x * s, one - s, s);
    return x * s;
  }
  if (activation == Activation::gelu) {
    Vec density;
    const Vec below = normal_distribution(x, &density);
    *slope = fma(x, density, below);
    return x * below;
  }
  const Vec inner = Vec::of(0.7978845608028654f), cubic = Vec::of(0.044715f) * x * x;
  Vec steepness;
  const Vec below = fma(half, tanh(inner * fma(x, cubic, x), &steepness), half);
  *slope = fma(half * x * steepness, inner * fma(Vec::of(3.0f), cubic, one), below);
  return x * below;
}

template <typename T, Activation activation>
void gated_rows(const GatedRows& rows, const Matrix& out) {
#pragma omp parallel for schedule(static) num_threads(rows.threads) if (rows.rows * rows.size > serial_elements)
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    const Row<T> gate = row_at<T>(rows.gate.data, row * rows.gate.stride, rows.size);
    const Row<T> up = row_at<T>(rows.up.data, row * rows.up.stride, rows.size);
    const Row<T> y = row_at<T>(out.data, row * out.stride, rows.size);
    Vec slope;
    for (std::int64_t i = 0; i < rows.size; i += Vec::width) {
      y.store(i, activate<activation>(gate.load(i), &slope) * up.load(i));
    }
  }
}

template <typename T, Activation activation>
void gated_gradient_rows(const GatedRows& rows, const Matrix& dy, const Matrix& dgate, const Matrix& dup) {
#pragma omp parallel for schedule(static) num_threads(rows.threads) if (rows.rows * rows.size > serial_elements)
  for (std::int64_t row = 0; row < rows.rows; ++row) {
    const Row<T> gate = row_at<T>(rows.gate.data, row * rows.gate.stride, rows.size);
    const Row<T> up = row_at<T>(rows.up.data, row * rows.up.stride, rows.size);
    const Row<T> upstream = row_at<T>(dy.data, row * dy.stride, rows.size);
    const Row<T> to_gate = row_at<T>(dgate.data, row * dgate.stride, rows.size);
    const Row<T> to_up = row_at<T>(dup.data, row * dup.stride, rows.size);
    for (std::int64_t i = 0; i < rows.size; i += Vec::width) {
      Vec slope;
      const Vec active = activate<activation>(gate.load(i), &slope), g = upstream.load(i);
      to_up.store(i, g * active);
      to_gate.store(i, g * up.load(i) * slope);
    }
  }
}

template <typename T>
inline void rotate_head(const Rotation& r, const T* x, const T* cos, const T* sin, T* out) {
  const std::int64_t half = r.rotary / 2;
  const Row<T> first = row_at<T>(x, 0, half), second = row_at<T>(x, half, half);
  const Row<T> cos_first = row_at<T>(cos, 0, half), cos_second = row_at<T>(cos, half, half);
  const Row<T> sin_first = row_at<T>(sin, 0, half), sin_second = row_at<T>(sin, half, half);
  const Row<T> to_first = row_at<T>(out, 0, half), to_second = row_at<T>(out, half, half);
  for (std::int64_t start = 0; start < half; start += Vec::width) {
    // The last whole vector ends at the end: what is written twice is the same, and no tail is copied.
    const std::int64_t last = half - Vec::width, i = last >= 0 && start > last ? last : start;
    const Vec a = first.load(i), b = second.load(i);
    // The gradient reads the other half's sine, with the other sign.
    const Vec sin_a = r.is_transposed ? Vec::of(0) - sin_second.load(i) : sin_first.load(i);
    const Vec sin_b = r.is_transposed ? Vec::of(0) - sin_first.load(i) : sin_second.load(i);
    to_first.store(i, a * cos_first.load(i) - b * sin_a);
    to_second.store(i, b * cos_second.load(i) + a * sin_b);
  }
  for (std::int64_t i = r.rotary; i < r.size; ++i) out[i] = x[i];
}

template <typename T>
void rotate_rows(const Rotation& r) {
  const std::int64_t tokens = r.batch * r.length, elements = tokens * r.heads * r.size;
#pragma omp parallel for schedule(static) num_threads(r.threads) if (elements > serial_elements)
  for (std::int64_t token = 0; token < tokens; ++token) {
    const std::int64_t batch = token / r.length, position = token % r.length;
    const std::int64_t angle = batch * r.angle_stride[0] + position * r.angle_stride[1];
    const T* x = static_cast<const T*>(r.x) + batch * r.x_stride[0] + position * r.x_stride[2];
    T* out = static_cast<T*>(r.out) + batch * r.out_stride[0] + position * r.out_stride[2];
    for (std::int64_t head = 0; head < r.heads; ++head) {
      rotate_head(r, x + head * r.x_stride[1], static_cast<const T*>(r.cos) + angle,
                  static_cast<const T*>(r.sin) + angle, out + head * r.out_stride[1]);
    }
  }
}

void norm(const NormRows& rows, void* y) { rows.is_bfloat16 ? norm_rows<BFloat16>(rows, y) : norm_rows<float>(rows, y); }

void norm_gradient(const NormRows& rows, const NormGradients& out) {
  rows.is_bfloat16 ? norm_gradient_rows<BFloat16>(rows, out) : norm_gradient_rows<float>(rows, out);
}

template <Activation activation>
void gated_of(const GatedRows& rows, const Matrix& out) {
  out.is_bfloat16 ? gated_rows<BFloat16, activation>(rows, out) : gated_rows<float, activation>(rows, out);
}

void gated(const GatedRows& rows, const Matrix& out) {
  if (rows.activation == Activation::silu) return gated_of<Activation::silu>(rows, out);
  if (rows.activation == Activation::gelu) return gated_of<Activation::gelu>(rows, out);
  gated_of<Activation::gelu_tanh>(rows, out);
}

template <Activation activation>
void gated_gradient_of(const GatedRows& rows, const Matrix& dy, const Matrix& dgate, const Matrix& dup) {
  dy.is_bfloat16 ? gated_gradient_rows<BFloat16, activation>(rows, dy, dgate, dup)
                 : gated_gradient_rows<float, activation>(rows, dy, dgate, dup);
}

void gated_gradient(const GatedRows& rows, const Matrix& dy, const Matrix& dgate, const Matrix& dup) {
  if (rows.activation == Activation::silu) return gated_gradient_of<Activation::silu>(rows, dy, dgate, dup);
  if (rows.activation == Activation::gelu) return gated_gradient_of<Activation::gelu>(rows, dy, dgate, dup);
  gated_gradient_of<Activation::gelu_tanh>(rows, dy, dgate, dup);
}

void rotate(const Rotation& rotation) {
  rotation.is_bfloat16 ? rotate_rows<BFloat16>(rotation) : rotate_rows<float>(rotation);
}

}  // namespace fused

constexpr FusedKernels fused_kernels = {fused::norm, fused::norm_gradient, fused::gated, fused::gated_gradient,
                                        fused::rotate};

}  // namespace
}  // namespace fastppo
