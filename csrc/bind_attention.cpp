// Python's view of attention. Addresses come as integers and are checked by fastppo/ops/native_attention.py, which
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
using fastppo::AttentionShape;
using fastppo::KeyValuePool;
using fastppo::PagedRows;
using fastppo::RaggedRows;
using Heads = std::tuple<Address, std::int64_t, std::int64_t, bool>;

fastppo::TokenHeads heads_of(const Heads& heads) {
  const auto [data, token_stride, head_stride, is_bfloat16] = heads;
  return {at<void>(data), token_stride, head_stride, is_bfloat16};
}

void store(const PagedRows& rows, const KeyValuePool& pool, const Heads& keys, const Heads& values, int threads) {
  const fastppo::TokenHeads k = heads_of(keys), v = heads_of(values);
  const py::gil_scoped_release release;
  const auto part = fastppo::kernels().attention.write_part;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) part(rows, pool, k, v, thread, threads);
}

void attend(const PagedRows& rows, const KeyValuePool& pool, const AttentionShape& shape, const Heads& queries,
            const Heads& out, int threads) {
  const fastppo::TokenHeads q = heads_of(queries), o = heads_of(out);
  const py::gil_scoped_release release;
  const auto& kernels = fastppo::kernels().attention;
  const auto bytes = static_cast<std::size_t>(kernels.scratch_bytes(rows.heads, pool));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    void* scratch = fastppo::thread_scratch(bytes);
    kernels.attend_part(rows, pool, shape, q, o, scratch, thread, threads);
  }
}

void forward(const RaggedRows& rows, const AttentionShape& shape, const std::array<Heads, 4>& heads, Address log_sums) {
  const fastppo::TokenHeads q = heads_of(heads[0]), k = heads_of(heads[1]), v = heads_of(heads[2]);
  const fastppo::TokenHeads out = heads_of(heads[3]);
  const py::gil_scoped_release release;
  fastppo::kernels().attention.forward(rows, shape, q, k, v, out, at<float>(log_sums));
}

void backward(const RaggedRows& rows, const AttentionShape& shape, const std::array<Heads, 8>& heads,
              Address log_sums) {
  const fastppo::BackwardHeads parts = {heads_of(heads[0]), heads_of(heads[1]), heads_of(heads[2]),
                                        heads_of(heads[3]), heads_of(heads[4]), heads_of(heads[5]),
                                        heads_of(heads[6]), heads_of(heads[7])};
  const py::gil_scoped_release release;
  fastppo::kernels().attention.backward(rows, shape, parts, at<const float>(log_sums));
}

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<KeyValuePool>(module, "KeyValuePool")
      .def(py::init([](Address keys, Address values, bool is_bfloat16, std::array<std::int64_t, 3> sizes) {
        return KeyValuePool{at<void>(keys), at<void>(values), is_bfloat16, sizes[0], sizes[1], sizes[2]};
      }));
  py::class_<PagedRows>(module, "PagedRows")
      .def(py::init([](std::array<std::int64_t, 2> shape, Address sequences, Address positions, Address tables,
                       std::int64_t table_stride) {
        return PagedRows{shape[0], shape[1], at<const std::int32_t>(sequences), at<const std::int32_t>(positions),
                     at<const std::int32_t>(tables), table_stride};
      }));
  py::class_<AttentionShape>(module, "AttentionShape")
      .def(py::init([](float scale, float softcap, std::int64_t window, Address sinks, Address alibi_slopes) {
        return AttentionShape{scale, softcap, window, at<const float>(sinks), at<const float>(alibi_slopes)};
      }));
  py::class_<RaggedRows>(module, "RaggedRows")
      .def(py::init([](std::array<std::int64_t, 5> shape, Address offsets, Address key_offsets, bool is_causal,
                       int threads) {
        return RaggedRows{shape[0], shape[1], shape[2], shape[3], shape[4], at<const std::int32_t>(offsets),
                       at<const std::int32_t>(key_offsets), is_causal, threads};
      }));
  module.def("paged_write", &store, "Store keys and values of rows in their blocks.");
  module.def("paged_attention", &attend, "Write the attention of rows over the blocks of their sequences.");
  module.def("attention_forward", &forward, "Write the attention of ragged sequences and the logs of its sums.");
  module.def("attention_backward", &backward, "Write the gradients by queries, keys and values.");
}
