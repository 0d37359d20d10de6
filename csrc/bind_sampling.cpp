// Python's view of the sampler. Addresses come as integers and are checked by fastppo/ops/sampling.py, which holds the
// tensors; they are not kept after the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "cpu.hpp"
#include "philox.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void sample(std::tuple<std::int64_t, std::int64_t> shape, std::tuple<Address, std::int64_t, bool> logits,
            std::tuple<double, double, double> scaling, std::tuple<std::uint64_t, Address, Address> numbers,
            std::tuple<std::int64_t, double, bool> limits, std::tuple<Address, std::int64_t, Address> forbidden,
            std::tuple<Address, Address, Address, Address> out, int threads) {
  const auto [rows, vocabulary] = shape;
  const auto [data, stride, is_bfloat16] = logits;
  const auto [scale, softcap, temperature] = scaling;
  const auto [seed, requests, positions] = numbers;
  const auto [top_k, top_p, is_greedy] = limits;
  const auto [ids, num_ids, is_forbidden] = forbidden;
  const auto [tokens, logprobs, entropies, kept_mass] = out;
  const fastppo::SamplingRows arguments = {
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
  const fastppo::Draws draws = {at<std::int64_t>(tokens), at<float>(logprobs), at<float>(entropies),
                                at<float>(kept_mass)};
  const py::gil_scoped_release release;
  fastppo::kernels().sampling.sample(arguments, draws);
}

std::array<std::uint32_t, 4> philox(std::uint64_t seed, std::array<std::uint32_t, 4> counter) {
  const fastppo::Words words = fastppo::philox(seed, {{counter[0], counter[1], counter[2], counter[3]}});
  return {words.at[0], words.at[1], words.at[2], words.at[3]};
}

}  // namespace

void bind_sampling(py::module_& module) {
  module.def("sample_tokens", &sample, py::arg("shape"), py::arg("logits"), py::arg("scaling"), py::arg("numbers"),
             py::arg("limits"), py::arg("forbidden"), py::arg("out"), py::arg("threads"),
             "Write token, log-prob, entropy and kept mass of a draw from each row of raw logits.");
  module.def("philox", &philox, py::arg("seed"), py::arg("counter"),
             "Return the four words of Philox-4x32-10 for a counter of four words under a 64-bit seed.");
}
