#include "small_matmul.hpp"

#include <cstddef>

#include "cpu.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastppo {

void small_matmul(const SmallMatmul& matmul, int threads) {
  const SmallMatmulKernels& kernels = fastppo::kernels().small_matmul;
  const auto bytes = static_cast<std::size_t>(kernels.packed_bytes(matmul.rows, matmul.inputs, matmul.type));
  void* packed = thread_scratch(bytes);
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

}  // namespace fastppo
