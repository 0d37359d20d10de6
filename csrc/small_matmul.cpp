#include "small_matmul.hpp"

#include <cstddef>

#include "cpu.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastppo {
namespace {

// Rows that are packed at a time, which bounds the memory.
constexpr std::int64_t most_rows = 512;

void multiply(const SmallMatmul& matmul, void* packed, int threads) {
  const SmallMatmulKernels& kernels = fastppo::kernels().small_matmul;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      // A team may have fewer threads than were asked for.
      const int thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
      kernels.pack(matmul, packed, thread, num_threads);
#pragma omp barrier
      kernels.part(matmul, packed, thread, num_threads);
    }
    return;
  }
#endif
  kernels.pack(matmul, packed, 0, 1);
  kernels.part(matmul, packed, 0, 1);
}

void multiply_dots(const SmallMatmul& matmul, int threads) {
  const SmallMatmulKernels& kernels = fastppo::kernels().small_matmul;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    kernels.dots(matmul, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  kernels.dots(matmul, 0, 1);
}

}  // namespace

void small_matmul(const SmallMatmul& matmul, bool is_row_invariant, int threads) {
  const bool is_coded = (is_int8(matmul.type) && !matmul.is_transposed) || is_nibbles(matmul.type);
  if (!is_row_invariant && is_coded && matmul.rows <= most_dot_rows) {
    multiply_dots(matmul, threads);
    return;
  }
  SmallMatmul some = matmul;
  some.rows = matmul.rows < most_rows ? matmul.rows : most_rows;
  const std::int64_t bytes = kernels().small_matmul.packed_bytes(some.rows, some.inputs, some.type);
  void* packed = thread_scratch(static_cast<std::size_t>(bytes));
  for (std::int64_t row = 0; row < matmul.rows; row += most_rows) {
    some.rows = matmul.rows - row < most_rows ? matmul.rows - row : most_rows;
    some.x = matmul.x + row * matmul.x_stride;
    some.out = matmul.out + row * matmul.out_stride;
    multiply(some, packed, threads);
  }
}

}  // namespace fastppo
