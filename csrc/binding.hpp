// What Python hands over: addresses come as integers, are checked by the callers in fastppo/, which hold the tensors, and
// are not kept after the call.
#pragma once

#include <cstdint>
#include <tuple>

#include "sampling.hpp"
#include "small_matmul.hpp"

namespace fastppo {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (rows, inputs, outputs), x with its stride, the weight as (address, stride, type, is transposed, scales), the bias with
// whether it is bfloat16, and the result with its stride.
using MatmulArguments =
    std::tuple<std::tuple<std::int64_t, std::int64_t, std::int64_t>, std::tuple<Address, std::int64_t>,
               std::tuple<Address, std::int64_t, int, bool, Address>, std::tuple<Address, bool>,
               std::tuple<Address, std::int64_t>>;

inline SmallMatmul matmul_of(const MatmulArguments& given, double scale, bool accumulate, const FourBits* four_bits) {
  const auto& [shape, x, weight, bias, out] = given;
  const auto [rows, inputs, outputs] = shape;
  const auto [x_data, x_stride] = x;
  const auto [weight_data, weight_stride, type, is_transposed, row_scales] = weight;
  const auto [bias_data, bias_is_bfloat16] = bias;
  const auto [out_data, out_stride] = out;
  return {
      rows,
      inputs,
      outputs,
      at<const float>(x_data),
      x_stride,
      at<const void>(weight_data),
      weight_stride,
      static_cast<WeightType>(type),
      is_transposed,
      at<const float>(row_scales),
      at<const void>(bias_data),
      bias_is_bfloat16,
      static_cast<float>(scale),
      accumulate,
      false,
      at<float>(out_data),
      out_stride,
      four_bits == nullptr ? FourBits{} : *four_bits,
  };
}

// (rows, vocabulary), the logits as (address, stride, is bfloat16), (logit scale, softcap or 0, temperature), (seed,
// requests, positions), (top-k, top-p, is greedy) and the forbidden ids as (address, count, rows in which they are).
using SamplingArguments =
    std::tuple<std::tuple<std::int64_t, std::int64_t>, std::tuple<Address, std::int64_t, bool>,
               std::tuple<double, double, double>, std::tuple<std::uint64_t, Address, Address>,
               std::tuple<std::int64_t, double, bool>, std::tuple<Address, std::int64_t, Address>, int>;

inline SamplingRows sampling_rows_of(const SamplingArguments& given) {
  const auto& [shape, logits, scaling, numbers, limits, forbidden, threads] = given;
  const auto [rows, vocabulary] = shape;
  const auto [data, stride, is_bfloat16] = logits;
  const auto [scale, softcap, temperature] = scaling;
  const auto [seed, requests, positions] = numbers;
  const auto [top_k, top_p, is_greedy] = limits;
  const auto [ids, num_ids, is_forbidden] = forbidden;
  return {
      rows,
      vocabulary,
      {at<void>(data), stride, is_bfloat16},
      {static_cast<float>(scale), static_cast<float>(softcap), static_cast<float>(1.0 / temperature)},
      seed,
      at<const std::int64_t>(requests),
      at<const std::int64_t>(positions),
      top_k,
      top_p,
      at<const std::int64_t>(ids),
      num_ids,
      at<const bool>(is_forbidden),
      is_greedy,
      threads,
  };
}

// Tokens, log-probs, entropies and kept mass.
using DrawArguments = std::tuple<Address, Address, Address, Address>;

inline Draws draws_of(const DrawArguments& out) {
  const auto [tokens, logprobs, entropies, kept_mass] = out;
  return {at<std::int64_t>(tokens), at<float>(logprobs), at<float>(entropies), at<float>(kept_mass)};
}

}  // namespace fastppo
