// Python's view of the sampler; fastppo/ops/sampling.py checks what it gets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "binding.hpp"
#include "cpu.hpp"
#include "philox.hpp"

namespace py = pybind11;

namespace {

void sample(std::tuple<std::int64_t, std::int64_t> shape, std::tuple<fastppo::Address, std::int64_t, bool> logits,
            std::tuple<double, double, double> scaling,
            std::tuple<std::uint64_t, fastppo::Address, fastppo::Address> numbers,
            std::tuple<std::int64_t, double, bool> limits,
            std::tuple<fastppo::Address, std::int64_t, fastppo::Address> forbidden, const fastppo::DrawArguments& out,
            int threads) {
  const fastppo::SamplingRows rows =
      fastppo::sampling_rows_of({shape, logits, scaling, numbers, limits, forbidden, threads});
  const fastppo::Draws draws = fastppo::draws_of(out);
  const py::gil_scoped_release release;
  fastppo::kernels().sampling.sample(rows, draws);
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
