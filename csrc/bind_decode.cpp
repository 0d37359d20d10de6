// Python's view of the decode program. fastppo/engine/listing.py appends the operations and holds the tensors whose
// addresses it hands over.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "binding.hpp"
#include "decode_loop.hpp"

namespace py = pybind11;

namespace {

using fastppo::Address;
using fastppo::at;
using fastppo::DecodeOperation;
using fastppo::DecodeProgram;
using fastppo::Operation;
using Place = std::tuple<std::int64_t, std::int64_t>;

fastppo::Place place(const Place& given) { return {std::get<0>(given), std::get<1>(given)}; }

DecodeOperation operation(Operation kind, std::int64_t width, bool waits) {
  DecodeOperation made = {};
  made.kind = kind;
  made.waits = waits;
  made.width = width;
  return made;
}

void embed(DecodeProgram& program, Place to, std::int64_t width, std::tuple<Address, std::int64_t, bool> table,
           std::tuple<Address, std::int64_t> positions, double scale) {
  const auto [data, stride, is_bfloat16] = table;
  const auto [learned, offset] = positions;
  DecodeOperation made = operation(Operation::embed, width, false);
  made.embed = {place(to), at<void>(data), stride, is_bfloat16, at<float>(learned), offset, static_cast<float>(scale)};
  program.append(made);
}

void normalise(DecodeProgram& program, Place from, Place to, std::int64_t width,
               std::tuple<std::int64_t, std::int64_t> groups, std::tuple<Address, Address> parameters, double epsilon,
               bool is_centred, bool waits) {
  const auto [count, weight_stride] = groups;
  const auto [weight, bias] = parameters;
  DecodeOperation made = operation(Operation::normalise, width, waits);
  made.normalise = {place(from),     place(to),       count, weight_stride, at<float>(weight), at<float>(bias),
                    static_cast<float>(epsilon), is_centred};
  program.append(made);
}

void add(DecodeProgram& program, Place from, Place to, std::int64_t width, double scale, bool waits) {
  DecodeOperation made = operation(Operation::add, width, waits);
  made.add = {place(from), place(to), static_cast<float>(scale)};
  program.append(made);
}

void rotate(DecodeProgram& program, Place from, Place to, std::int64_t width, const std::vector<std::int64_t>& columns,
            std::tuple<std::int64_t, bool> rope, bool waits) {
  const auto [table, is_interleaved] = rope;
  DecodeOperation made = operation(Operation::rotate, width, waits);
  const auto heads = static_cast<std::int64_t>(columns.size());
  made.rotate = {place(from), place(to), program.keep(columns), heads, table, is_interleaved};
  program.append(made);
}

void activate(DecodeProgram& program, Place gate, Place up, Place to, std::int64_t width, int function, bool waits) {
  DecodeOperation made = operation(Operation::activate, width, waits);
  made.activate = {place(gate), place(up), place(to), static_cast<fastppo::Nonlinearity>(function)};
  program.append(made);
}

void pack(DecodeProgram& program, Place from, std::int64_t inputs, int type, std::int64_t number, bool waits) {
  DecodeOperation made = operation(Operation::pack, inputs, waits);
  made.multiply = {};
  made.multiply.from = place(from);
  made.multiply.shared_pack = number;
  made.multiply.matmul.inputs = inputs;
  made.multiply.matmul.type = static_cast<fastppo::WeightType>(type);
  program.append(made);
}

void multiply(DecodeProgram& program, Place from, Place to, std::tuple<std::int64_t, std::int64_t> shape,
              std::tuple<Address, std::int64_t, int, bool, Address> weight, Address bias,
              std::tuple<double, bool> addition, std::int64_t shared_pack, bool waits,
              const fastppo::FourBits* four_bits) {
  const auto [outputs, inputs] = shape;
  const auto [data, stride, type, is_transposed, row_scales] = weight;
  const auto [scale, accumulates] = addition;
  DecodeOperation made = operation(Operation::multiply, outputs, waits);
  made.multiply = {};
  made.multiply.from = place(from);
  made.multiply.to = place(to);
  made.multiply.shared_pack = shared_pack;
  fastppo::SmallMatmul& matmul = made.multiply.matmul;
  matmul.inputs = inputs;
  matmul.outputs = outputs;
  matmul.weight = at<void>(data);
  matmul.weight_stride = stride;
  matmul.type = static_cast<fastppo::WeightType>(type);
  matmul.is_transposed = is_transposed;
  matmul.row_scales = at<float>(row_scales);
  matmul.bias = at<void>(bias);
  matmul.scale = static_cast<float>(scale);
  matmul.accumulate = accumulates;
  if (four_bits != nullptr) matmul.four_bits = *four_bits;
  program.append(made);
}

void attend(DecodeProgram& program, std::tuple<Place, Place, Place, Place> places,
            std::tuple<std::int64_t, std::int64_t, std::int64_t> numbers,
            std::tuple<double, double, std::int64_t, Address> shape) {
  const auto& [queries, keys, values, to] = places;
  const auto [layer, group, heads] = numbers;
  const auto [scale, softcap, window, sinks] = shape;
  DecodeOperation made = operation(Operation::write, 0, true);
  made.attend = {place(queries), place(keys), place(values), place(to), layer, group, heads,
                 {static_cast<float>(scale), static_cast<float>(softcap), window, at<float>(sinks), nullptr}};
  program.append(made);
  made.kind = Operation::attend;
  program.append(made);
}

// The lists that a step points to.
struct StepLists {
  std::vector<fastppo::BlockTables> tables;
  std::vector<fastppo::KeyValuePool> pools;
  std::vector<fastppo::RopeTable> ropes;
};

// (rows, ids, positions, sequences), the tables with their strides, by layer the pools with (is bfloat16, heads, head
// size, value size), and the angles with their width.
using StepArguments =
    std::tuple<std::tuple<std::int64_t, Address, Address, Address>, std::vector<std::tuple<Address, std::int64_t>>,
               std::vector<std::tuple<Address, Address, bool, std::int64_t, std::int64_t, std::int64_t>>,
               std::vector<std::tuple<Address, Address, std::int64_t>>>;

fastppo::DecodeStep step_of(const StepArguments& given, StepLists* lists) {
  const auto& [rows, tables, pools, ropes] = given;
  const auto [count, ids, positions, sequences] = rows;
  for (const auto& [data, stride] : tables) lists->tables.push_back({at<std::int32_t>(data), stride});
  for (const auto& [keys, values, is_bfloat16, kv_heads, head_size, value_size] : pools) {
    lists->pools.push_back({at<void>(keys), at<void>(values), is_bfloat16, kv_heads, head_size, value_size});
  }
  for (const auto& [cosines, sines, width] : ropes) {
    lists->ropes.push_back({at<float>(cosines), at<float>(sines), width});
  }
  fastppo::DecodeStep step = {};
  step.rows = count;
  step.ids = at<std::int64_t>(ids);
  step.positions = at<std::int32_t>(positions);
  step.sequences = at<std::int32_t>(sequences);
  step.tables = lists->tables.data();
  step.pools = lists->pools.data();
  step.ropes = lists->ropes.data();
  return step;
}

void run(DecodeProgram& program, const StepArguments& arguments, Address out, int threads) {
  StepLists lists;
  const fastppo::DecodeStep step = step_of(arguments, &lists);
  const py::gil_scoped_release release;
  program.run(step, at<float>(out), threads);
}

std::int64_t run_loop(DecodeProgram& program, const StepArguments& arguments,
                      const std::tuple<fastppo::MatmulArguments, int>& head, const fastppo::SamplingArguments& sampling,
                      std::tuple<Address, std::int64_t, Address, std::int64_t> bounds, std::int64_t most,
                      Address hidden, const fastppo::DrawArguments& out, int threads) {
  const auto [drawn, least, ends, num_ends] = bounds;
  const fastppo::DecodeLoop loop = {
      fastppo::matmul_of(std::get<0>(head), 1.0, false, nullptr),
      fastppo::sampling_rows_of(sampling),
      std::get<1>(head),
      at<std::int64_t>(drawn),
      least,
      at<std::int64_t>(ends),
      num_ends,
      most,
      at<float>(hidden),
      fastppo::draws_of(out),
  };
  StepLists lists;
  const fastppo::DecodeStep step = step_of(arguments, &lists);
  const py::gil_scoped_release release;
  return fastppo::run_loop(program, step, loop, threads);
}

}  // namespace

void bind_decode(py::module_& module) {
  py::class_<DecodeProgram>(module, "DecodeProgram", "The operations of a decode step; places are (buffer, column).")
      .def(py::init<const std::vector<std::int64_t>&, bool>(), py::arg("widths"), py::arg("rounds"))
      .def("embed", &embed)
      .def("normalise", &normalise)
      .def("add", &add)
      .def("rotate", &rotate)
      .def("activate", &activate)
      .def("pack", &pack)
      .def("multiply", &multiply)
      .def("attend", &attend)
      .def("run", &run, "Run all operations on the rows of a step, without the GIL.")
      .def("loop", &run_loop, py::arg("step"), py::arg("head"), py::arg("sampling"), py::arg("bounds"), py::arg("most"),
           py::arg("hidden"), py::arg("out"), py::arg("threads"),
           "Run and draw step after step until one of the ids that end a response is drawn; return how many were run.");
}
