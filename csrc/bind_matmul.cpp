// Python's view of the matmul of few rows; fastppo/ops/matmul.py checks what it gets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "binding.hpp"

namespace py = pybind11;

namespace {

using fastppo::Address;
using fastppo::at;

void small_matmul(std::tuple<std::int64_t, std::int64_t, std::int64_t> shape, std::tuple<Address, std::int64_t> x,
                  std::tuple<Address, std::int64_t, int, bool, Address> weight, std::tuple<Address, bool> bias,
                  double scale, bool accumulate, std::tuple<Address, std::int64_t> out, bool is_row_invariant,
                  int threads, const fastppo::FourBits* four_bits) {
  const fastppo::SmallMatmul matmul =
      fastppo::matmul_of({shape, x, weight, bias, out}, scale, accumulate, four_bits);
  const py::gil_scoped_release release;
  fastppo::small_matmul(matmul, is_row_invariant, threads);
}

}  // namespace

void bind_matmul(py::module_& module) {
  py::class_<fastppo::FourBits>(module, "FourBits", "What codes of four bits stand for; zeros where it is not nested.")
      .def(py::init([](Address table, Address absmax, std::int64_t block,
                       std::tuple<Address, Address, std::int64_t, double> nested) {
             const auto [nested_table, nested_absmax, nested_block, offset] = nested;
             return fastppo::FourBits{at<const float>(table),        at<const void>(absmax),
                                      block,                         at<const float>(nested_table),
                                      at<const float>(nested_absmax), nested_block,
                                      static_cast<float>(offset)};
           }),
           py::arg("table"), py::arg("absmax"), py::arg("block"), py::arg("nested"));
  module.def("small_matmul", &small_matmul, py::arg("shape"), py::arg("x"), py::arg("weight"), py::arg("bias"),
             py::arg("scale"), py::arg("accumulate"), py::arg("out"), py::arg("row_invariant"), py::arg("threads"),
             py::arg("four_bits") = nullptr,
             "Write the product of few rows with a weight matrix that stays as it lies in memory.");
}
