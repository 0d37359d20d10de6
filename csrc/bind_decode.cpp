// Python's view of the decode program. fastppo/engine/program.py appends the operations and holds the tensors whose
// addresses it hands over; those of a step are not kept after the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "decode_program.hpp"

namespace py = pybind11;

namespace {

using fastppo::DecodeOperation;
using fastppo::DecodeProgram;
using fastppo::Operation;
using Address = std::uintptr_t;
using Place = std::tuple<std::int64_t, std::int64_t>;

template <typename T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

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

void run(DecodeProgram& program, std::tuple<std::int64_t, Address, Address, Address> rows,
         const std::vector<std::tuple<Address, std::int64_t>>& tables,
         const std::vector<std::tuple<Address, Address, bool, std::int64_t, std::int64_t, std::int64_t>>& pools,
         const std::vector<std::tuple<Address, Address, std::int64_t>>& ropes, Address out, int threads) {
  const auto [count, ids, positions, sequences] = rows;
  std::vector<fastppo::BlockTables> table_list;
  for (const auto& [data, stride] : tables) table_list.push_back({at<std::int32_t>(data), stride});
  std::vector<fastppo::KeyValuePool> pool_list;
  for (const auto& [keys, values, is_bfloat16, kv_heads, head_size, value_size] : pools) {
    pool_list.push_back({reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values), is_bfloat16, kv_heads,
                         head_size, value_size});
  }
  std::vector<fastppo::RopeTable> rope_list;
  for (const auto& [cosines, sines, width] : ropes) rope_list.push_back({at<float>(cosines), at<float>(sines), width});
  fastppo::DecodeStep step = {};
  step.rows = count;
  step.ids = at<std::int64_t>(ids);
  step.positions = at<std::int32_t>(positions);
  step.sequences = at<std::int32_t>(sequences);
  step.tables = table_list.data();
  step.pools = pool_list.data();
  step.ropes = rope_list.data();
  const py::gil_scoped_release release;
  program.run(step, reinterpret_cast<float*>(out), threads);
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
      .def("run", &run, "Run all operations on the rows of a step, without the GIL.");
}
