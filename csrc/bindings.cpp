// Python's view of the native code: checks what comes in, releases the GIL, calls. No algorithm lives here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "checksum.hpp"
#include "gae.hpp"
#include "packing.hpp"

namespace py = pybind11;

void bind_attention(py::module_& module);  // bind_attention.cpp
void bind_decode(py::module_& module);     // bind_decode.cpp
void bind_fused(py::module_& module);      // bind_fused.cpp
void bind_head(py::module_& module);       // bind_head.cpp
void bind_matmul(py::module_& module);     // bind_matmul.cpp
void bind_sampling(py::module_& module);   // bind_sampling.cpp

namespace {

// C-contiguous arrays of exactly this type; pybind11 would otherwise copy and convert without a word.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool condition, const std::string& message) {
  if (!condition) {
    throw py::value_error(message);
  }
}

std::string describe(const py::array& array) {
  std::string text = py::cast<std::string>(py::str(array.dtype())) + "[";
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    text += (axis ? ", " : "") + std::to_string(array.shape(axis));
  }
  return text + "]";
}

template <typename T>
Array<T> as_vector(const py::array& array, const char* name, const char* dtype) {
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::type_error(std::string(name) + " is " + describe(array) + ", expected " + dtype +
                         ": convert it with .astype(numpy." + dtype + ")");
  }
  require(array.ndim() == 1, std::string(name) + " is " + describe(array) + ", expected one axis: flatten it first");
  require(py::isinstance<Array<T>>(array),
          std::string(name) + " is not contiguous: pass numpy.ascontiguousarray(" + name + ")");
  return py::cast<Array<T>>(array);
}

void check_offsets(const Array<std::int64_t>& offsets, py::ssize_t num_tokens) {
  const py::ssize_t count = offsets.size();
  require(count >= 1, "offsets is empty, expected (segments + 1,) entries: pass [0] for no segments");
  const std::int64_t* at = offsets.data();
  require(at[0] == 0, "offsets[0] is " + std::to_string(at[0]) + ", expected 0: offsets start at the first token");
  for (py::ssize_t i = 1; i < count; ++i) {
    require(at[i] >= at[i - 1], "offsets[" + std::to_string(i) + "] is " + std::to_string(at[i]) + " after " +
                                    std::to_string(at[i - 1]) + ": offsets must never fall");
  }
  require(at[count - 1] == num_tokens, "offsets end at " + std::to_string(at[count - 1]) + " but rewards has " +
                                           std::to_string(num_tokens) + " tokens: the last offset is the total");
}

template <typename Real>
py::array gae_of(const py::array& rewards_in, const py::array& values_in, const py::array& offsets_in, double gamma,
                 double lam, const char* dtype) {
  const auto rewards = as_vector<Real>(rewards_in, "rewards", dtype);
  const auto values = as_vector<Real>(values_in, "values", dtype);
  const auto offsets = as_vector<std::int64_t>(offsets_in, "offsets", "int64");
  require(rewards.size() == values.size(), "rewards has " + std::to_string(rewards.size()) + " tokens and values " +
                                               std::to_string(values.size()) + ": pass one value per reward");
  check_offsets(offsets, rewards.size());
  py::array_t<Real> advantages(rewards.size());
  const Real* rewards_at = rewards.data();
  const Real* values_at = values.data();
  const std::int64_t* offsets_at = offsets.data();
  Real* advantages_at = advantages.mutable_data();
  const auto num_segments = static_cast<std::size_t>(offsets.size() - 1);
  {
    py::gil_scoped_release release;
    fastppo::gae<Real>(rewards_at, values_at, offsets_at, num_segments, static_cast<Real>(gamma),
                       static_cast<Real>(lam), advantages_at);
  }
  return advantages;
}

py::array gae(const py::array& rewards, const py::array& values, const py::array& offsets, double gamma, double lam) {
  if (py::isinstance<py::array_t<float>>(rewards)) {
    return gae_of<float>(rewards, values, offsets, gamma, lam, "float32");
  }
  if (py::isinstance<py::array_t<double>>(rewards)) {
    return gae_of<double>(rewards, values, offsets, gamma, lam, "float64");
  }
  throw py::type_error("rewards is " + describe(rewards) + ", expected float32 or float64: convert it with .astype");
}

void check_packing(const Array<std::int64_t>& lengths, std::int64_t num_bins, std::int64_t max_per_bin) {
  const auto num_items = static_cast<std::int64_t>(lengths.size());
  require(num_bins >= 1, "num_bins=" + std::to_string(num_bins) + ", expected at least 1");
  const std::int64_t needed = num_items / num_bins + (num_items % num_bins != 0);
  require(max_per_bin >= needed, std::to_string(num_items) + " sequences do not fit into num_bins=" +
                                     std::to_string(num_bins) + " bins of max_per_bin=" + std::to_string(max_per_bin) +
                                     ": raise max_per_bin to " + std::to_string(needed) + " or use more bins");
  const std::int64_t* at = lengths.data();
  for (std::int64_t i = 0; i < num_items; ++i) {
    require(at[i] >= 0, "lengths[" + std::to_string(i) + "] is " + std::to_string(at[i]) +
                            ": a sequence has zero tokens or more");
  }
}

py::array pack(const py::array& lengths_in, std::int64_t num_bins, std::int64_t max_per_bin) {
  const auto lengths = as_vector<std::int64_t>(lengths_in, "lengths", "int64");
  check_packing(lengths, num_bins, max_per_bin);
  py::array_t<std::int64_t> bins(lengths.size());
  const std::int64_t* lengths_at = lengths.data();
  std::int64_t* bins_at = bins.mutable_data();
  const auto num_items = static_cast<std::size_t>(lengths.size());
  {
    py::gil_scoped_release release;
    fastppo::pack(lengths_at, num_items, num_bins, max_per_bin, bins_at);
  }
  return bins;
}

// Addresses are checked by fastppo/ops/flat.py.
std::int64_t checksum(std::uintptr_t address, std::int64_t rows, std::int64_t columns, int bytes,
                      std::uint64_t multiplier) {
  const py::gil_scoped_release release;
  std::uint64_t found = 0;
  if (bytes == 1) found = fastppo::checksum(reinterpret_cast<const std::int8_t*>(address), rows, columns, multiplier);
  if (bytes == 2) found = fastppo::checksum(reinterpret_cast<const std::int16_t*>(address), rows, columns, multiplier);
  if (bytes == 4) found = fastppo::checksum(reinterpret_cast<const std::int32_t*>(address), rows, columns, multiplier);
  if (bytes == 8) found = fastppo::checksum(reinterpret_cast<const std::int64_t*>(address), rows, columns, multiplier);
  return static_cast<std::int64_t>(found);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native CPU code of fastppo; fastppo.reference holds a plain twin of each function.";
  module.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("offsets"), py::arg("gamma"), py::arg("lam"),
             "Return generalised advantage estimates (T,) of ragged segments of rewards (T,) and values (T,), float32 "
             "or float64, cut at offsets (B + 1,) int64. Raises TypeError or ValueError naming the bad argument.");
  module.def("pack", &pack, py::arg("lengths"), py::arg("num_bins"), py::arg("max_per_bin"),
             "Return the bin (N,) int64 of each sequence of lengths (N,) int64, in order, each to the bin with the "
             "fewest tokens. Raises ValueError when num_bins bins of max_per_bin sequences are too few.");
  module.def("checksum", &checksum, py::arg("address"), py::arg("rows"), py::arg("columns"), py::arg("bytes"),
             py::arg("multiplier"), "Return a fingerprint of a matrix of words of so many bytes each.");
  bind_attention(module);
  bind_decode(module);
  bind_fused(module);
  bind_head(module);
  bind_matmul(module);
  bind_sampling(module);
}
