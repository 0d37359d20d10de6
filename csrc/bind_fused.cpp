// Python's view of the layers' row kernels. Addresses come as integers and are checked by fastppo/ops/fused.py, which
// holds the tensors; they are not kept after the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "binding.hpp"
#include "cpu.hpp"

namespace py = pybind11;

namespace {

using fastppo::Address;
using fastppo::at;
using Strides = std::array<std::int64_t, 3>;
// (rows, size, whether bfloat16, threads)
using RowsArgument = std::tuple<std::int64_t, std::int64_t, bool, int>;
// (address, elements from row to row)
using MatrixArgument = std::tuple<Address, std::int64_t>;

fastppo::NormRows norm_rows(const RowsArgument& shape, std::tuple<Address, Address, Address> tensors,
                            std::tuple<float, float> scalars) {
  const auto [rows, size, is_bfloat16, threads] = shape;
  const auto [x, weight, inverse_rms] = tensors;
  const auto [eps, offset] = scalars;
  return {rows, size,   is_bfloat16,           at<const void>(x), at<const void>(weight),
          eps,  offset, at<float>(inverse_rms), threads};
}

void norm_gradient(const RowsArgument& shape, std::tuple<Address, Address, Address> tensors,
                   std::tuple<float, float> scalars, std::tuple<Address, Address, Address> gradients,
                   std::tuple<Address, std::int64_t> blocks) {
  const auto [dy, dx, dweight] = gradients;
  const auto [partial, block_rows] = blocks;
  const fastppo::NormGradients out = {at<const void>(dy), at<void>(dx), at<void>(dweight), at<float>(partial),
                                      block_rows};
  const py::gil_scoped_release release;
  fastppo::kernels().fused.norm_gradient(norm_rows(shape, tensors, scalars), out);
}

fastppo::Matrix matrix(const RowsArgument& shape, const MatrixArgument& argument) {
  return {at<void>(std::get<0>(argument)), std::get<1>(argument), std::get<2>(shape)};
}

fastppo::GatedRows gated_rows(const RowsArgument& shape, const std::array<MatrixArgument, 2>& inputs, int activation) {
  return {std::get<0>(shape),
          std::get<1>(shape),
          matrix(shape, inputs[0]),
          matrix(shape, inputs[1]),
          static_cast<fastppo::Activation>(activation),
          std::get<3>(shape)};
}

void rotate(std::array<std::int64_t, 5> shape, std::tuple<Address, Strides> x, std::tuple<Address, Strides> out,
            std::tuple<Address, Address, std::int64_t, std::int64_t> angles, std::tuple<bool, bool, int> options) {
  const auto [cos, sin, batch_stride, position_stride] = angles;
  const auto [is_bfloat16, is_transposed, threads] = options;
  const Strides from = std::get<1>(x), to = std::get<1>(out);
  const fastppo::Rotation rotation = {shape[0],
                                      shape[1],
                                      shape[2],
                                      shape[3],
                                      shape[4],
                                      is_bfloat16,
                                      at<const void>(std::get<0>(x)),
                                      {from[0], from[1], from[2]},
                                      at<void>(std::get<0>(out)),
                                      {to[0], to[1], to[2]},
                                      at<const void>(cos),
                                      at<const void>(sin),
                                      {batch_stride, position_stride},
                                      is_transposed,
                                      threads};
  const py::gil_scoped_release release;
  fastppo::kernels().fused.rotate(rotation);
}

}  // namespace

void bind_fused(py::module_& module) {
  module.def(
      "norm",
      [](const RowsArgument& shape, std::tuple<Address, Address, Address> tensors, std::tuple<float, float> scalars,
         Address y) {
        const py::gil_scoped_release release;
        fastppo::kernels().fused.norm(norm_rows(shape, tensors, scalars), at<void>(y));
      },
      "Write RMSNorm of each row, and the inverse of its root mean square.");
  module.def("norm_gradient", &norm_gradient, "Write RMSNorm's gradients by x and, unless its address is 0, the weight.");
  module.def(
      "gated",
      [](const RowsArgument& shape, const std::array<MatrixArgument, 2>& inputs, int activation,
         const MatrixArgument& out) {
        const py::gil_scoped_release release;
        fastppo::kernels().fused.gated(gated_rows(shape, inputs, activation), matrix(shape, out));
      },
      "Write act(gate)·up.");
  module.def(
      "gated_gradient",
      [](const RowsArgument& shape, const std::array<MatrixArgument, 2>& inputs, int activation,
         const std::array<MatrixArgument, 3>& gradients) {
        const py::gil_scoped_release release;
        fastppo::kernels().fused.gated_gradient(gated_rows(shape, inputs, activation), matrix(shape, gradients[0]),
                                                matrix(shape, gradients[1]), matrix(shape, gradients[2]));
      },
      "Read dy, write the gradients of gate and up.");
  module.def("rotate", &rotate, "Write the heads of each token turned by its angles, or back for the gradient.");
}
