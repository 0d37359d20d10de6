// Python's view of the matmul of few rows. Addresses come as integers and are checked by fastppo/ops/matmul.py, which
// holds the tensors; they are not kept after the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "small_matmul.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void small_matmul(std::tuple<std::int64_t, std::int64_t, std::int64_t> shape, std::tuple<Address, std::int64_t> x,
                  std::tuple<Address, std::int64_t, int, bool, Address> weight, std::tuple<Address, bool> bias,
                  double scale, bool accumulate, std::tuple<Address, std::int64_t> out, bool is_row_invariant,
                  int threads, const fastppo::FourBits* four_bits) {
  const auto [rows, inputs, outputs] = shape;
  const auto [x_data, x_stride] = x;
  const auto [weight_data, weight_stride, type, is_transposed, row_scales] = weight;
  const auto [bias_data, bias_is_bfloat16] = bias;
  const auto [out_data, out_stride] = out;
  const fastppo::SmallMatmul matmul = {
      rows,
      inputs,
      outputs,
      at<const float>(x_data),
      x_stride,
      at<const void>(weight_data),
      weight_stride,
      static_cast<fastppo::WeightType>(type),
      is_transposed,
      at<const float>(row_scales),
      at<const void>(bias_data),
      bias_is_bfloat16,
      static_cast<float>(scale),
      accumulate,
      false,
      at<float>(out_data),
      out_stride,
      four_bits == nullptr ? fastppo::FourBits{} : *four_bits,
  };
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
