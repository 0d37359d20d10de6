// The draw of one token from each row of raw logits, with its log-prob and the row's entropy.
// fastppo/reference_sampling.py states what is drawn; every row is one thread's, summed in a fixed order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "head_rows.hpp"

namespace fastppo {

struct SamplingRows {
  std::int64_t rows;
  std::int64_t vocabulary;
  Matrix logits;
  Scaling scaling;
  std::uint64_t seed;
  const std::int64_t* requests;   // (rows,)
  const std::int64_t* positions;  // (rows,)
  std::int64_t top_k;             // 0: all
  double top_p;                   // 1: all
  const std::int64_t* forbidden_ids;
  std::int64_t num_forbidden;
  const bool* is_forbidden;  // (rows,); null: the ids are forbidden in every row
  bool is_greedy;
  int threads;
};

// One number a row each.
struct Draws {
  std::int64_t* tokens;
  float* logprobs;
  float* entropies;
  float* kept_mass;
};

// What every build of sampling.inc.hpp offers.
struct SamplingKernels {
  void (*sample)(const SamplingRows& rows, const Draws& out);
};

// Memory of the calling thread for `bytes` bytes, aligned to 64, kept from call to call: fresh pages would cost more
// than the draw. The next call on this thread may hand out the same.
void* thread_scratch(std::size_t bytes);

}  // namespace fastppo
