// Several steps of a decoder in a row, each beginning with the tokens that the one before has drawn.
#pragma once

#include <cstdint>

#include "decode_program.hpp"
#include "sampling.hpp"
#include "small_matmul.hpp"

namespace fastppo {

// Before the first step `sampling` is about the first draw; positions and what is forbidden move on from step to step.
struct DecodeLoop {
  SmallMatmul head;  // from hidden states, which are filled in, to raw logits
  SamplingRows sampling;
  int head_threads;
  const std::int64_t* drawn;  // (rows,) tokens that each response has
  std::int64_t least;         // a response of fewer must not draw the forbidden ids
  const std::int64_t* ends;   // (num_ends,) the ids that end a response
  std::int64_t num_ends;
  std::int64_t most;  // steps
  float* hidden;      // (most, rows, H)
  Draws out;          // (most, rows) each
};

// Return how many steps were done: all, or up to the first that ended a response.
std::int64_t run_loop(DecodeProgram& program, DecodeStep step, const DecodeLoop& loop, int threads);

}  // namespace fastppo
