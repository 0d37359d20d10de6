// Python's view of the head's row kernels. Addresses come as integers and are checked by fastppo/ops/rows.py, which
// holds the tensors; they are not kept after the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "binding.hpp"
#include "cpu.hpp"

namespace py = pybind11;

namespace {

using fastppo::Address;
using fastppo::at;
// (address, elements from row to row, whether bfloat16); address 0 for none.
using MatrixArgument = std::tuple<Address, std::int64_t, bool>;
// (logit_scale, softcap or 0, temperature)
using ScalingArgument = std::tuple<double, double, double>;
// Each of a row: logprobs, entropies, logsumexps (double), kl, ref_logsumexps (double).
using StatisticsArgument = std::tuple<Address, Address, Address, Address, Address>;

fastppo::Matrix matrix(const MatrixArgument& argument) {
  return {at<void>(std::get<0>(argument)), std::get<1>(argument), std::get<2>(argument)};
}

fastppo::Scaling scaling(const ScalingArgument& argument) {
  const auto [scale, softcap, temperature] = argument;
  return {static_cast<float>(scale), static_cast<float>(softcap), static_cast<float>(1.0 / temperature)};
}

fastppo::RowStatistics statistics_of(const StatisticsArgument& a) {
  return {at<float>(std::get<0>(a)), at<float>(std::get<1>(a)), at<double>(std::get<2>(a)), at<float>(std::get<3>(a)),
          at<double>(std::get<4>(a))};
}

fastppo::HeadRows head_rows(std::tuple<std::int64_t, std::int64_t> shape, const MatrixArgument& logits,
                            const ScalingArgument& scale, Address labels, const MatrixArgument& ref_logits,
                            const ScalingArgument& ref_scale, int threads) {
  return {std::get<0>(shape), std::get<1>(shape),   matrix(logits), scaling(scale), at<const std::int64_t>(labels),
          matrix(ref_logits), scaling(ref_scale), threads};
}

void use_isa(const std::string& name) {
  if (!fastppo::use_isa(name)) {
    std::string names;
    for (const std::string& isa : fastppo::available_isas()) {
      names += (names.empty() ? "" : ", ") + isa;
    }
    throw py::value_error("instruction set '" + name + "' is not available here; choose one of " + names);
  }
}

}  // namespace

void bind_head(py::module_& module) {
  py::class_<fastppo::HeadRows>(module, "HeadRows", "A chunk of raw logits: what every row kernel reads.")
      .def(py::init(&head_rows), py::arg("shape"), py::arg("logits"), py::arg("scaling"), py::arg("labels"),
           py::arg("ref_logits"), py::arg("ref_scaling"), py::arg("threads"));
  module.def(
      "row_statistics",
      [](const fastppo::HeadRows& rows, const StatisticsArgument& out) {
        const py::gil_scoped_release release;
        fastppo::kernels().head.statistics(rows, statistics_of(out));
      },
      "Write log-prob, entropy and log-sum-exp (and KL and its log-sum-exp, given reference logits) of each row.");
  module.def(
      "logit_gradient",
      [](const fastppo::HeadRows& rows, const StatisticsArgument& stats, std::tuple<Address, Address, Address, Address> up,
         const MatrixArgument& out) {
        const auto [logprob, entropy, logsumexp, kl] = up;
        const fastppo::RowGradients gradients = {at<const float>(logprob), at<const float>(entropy),
                                                 at<const float>(logsumexp), at<const float>(kl)};
        const py::gil_scoped_release release;
        fastppo::kernels().head.gradient(rows, statistics_of(stats), gradients, matrix(out));
      },
      "Write dLoss/d(logits) into `out`, which may be the logits, from dLoss by each statistic.");
  module.def(
      "ppo_rows",
      [](const fastppo::HeadRows& rows, const StatisticsArgument& stats,
         std::tuple<Address, Address, Address, Address, Address> terms, std::tuple<float, float, float, float> coefs,
         const MatrixArgument& out) {
        const auto [old, ref, advantages, weights, losses] = terms;
        const auto [clip_low, clip_high, kl_coef, entropy_coef] = coefs;
        const fastppo::PPOTerms ppo = {at<const float>(old),     at<const float>(ref), at<const float>(advantages),
                                       at<const float>(weights), at<float>(losses),    clip_low,
                                       clip_high,                kl_coef,              entropy_coef};
        const py::gil_scoped_release release;
        fastppo::kernels().head.ppo(rows, statistics_of(stats), ppo, matrix(out));
      },
      "Write statistics, PPO's weighted losses and, unless `out` is none, dLoss/d(logits) of each row.");
  module.def(
      "ppo_loss",
      [](std::int64_t count, Address logprobs, std::tuple<Address, Address, Address, Address, Address> terms,
         std::tuple<float, float, float> coefs, Address gradients) {
        const auto [old, ref, advantages, weights, losses] = terms;
        const auto [clip_low, clip_high, kl_coef] = coefs;
        const fastppo::PPOTerms ppo = {at<const float>(old),     at<const float>(ref), at<const float>(advantages),
                                       at<const float>(weights), at<float>(losses),    clip_low,
                                       clip_high,                kl_coef,              0.0f};
        const py::gil_scoped_release release;
        fastppo::kernels().head.ppo_loss(count, at<const float>(logprobs), ppo, at<float>(gradients));
      },
      "Write PPO's weighted losses (count,) and their derivatives by the log-probs.");
  module.def(
      "accumulate",
      [](std::int64_t count, Address addend, bool is_first, Address high, Address low, int threads) {
        const py::gil_scoped_release release;
        fastppo::kernels().head.accumulate(count, at<const std::uint16_t>(addend), is_first, at<std::uint16_t>(high),
                                           at<std::uint16_t>(low), threads);
      },
      "Add bfloat16 numbers to float32 sums that are kept as two halves, in two arrays of 16 bits.");
  module.def(
      "round_halves",
      [](std::int64_t count, Address high, Address low, int threads) {
        const py::gil_scoped_release release;
        fastppo::kernels().head.round_halves(count, at<std::uint16_t>(high), at<const std::uint16_t>(low), threads);
      },
      "Round float32 sums in two halves to bfloat16, in the upper one.");
  module.def("available_isas", &fastppo::available_isas,
             "Return the instruction sets that kernels were built for and that run here, the slowest first.");
  module.def(
      "isa", [] { return std::string(fastppo::kernels().isa); }, "Return the instruction set in use.");
  module.def("use_isa", &use_isa, py::arg("name"), "Use the kernels of one instruction set. Raises ValueError.");
}
