// A decoder's body as a list of operations, with the activation buffers that they work on.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "decode_operations.hpp"

namespace fastppo {

class DecodeProgram {
 public:
  // Buffer 0 is the caller's output; the others, of these many columns each, are the program's own. All hold floats;
  // those of a bf16 model, which `rounds`, have no more digits than its modules' results.
  DecodeProgram(const std::vector<std::int64_t>& widths, bool rounds);

  void append(const DecodeOperation& operation) { operations_.push_back(operation); }
  // Keep a list of columns for an operation to point to.
  const std::int64_t* keep(const std::vector<std::int64_t>& columns);
  // Fill in the buffers and do all operations on up to `threads` threads. Not to be called from two threads at once.
  void run(DecodeStep step, float* out, int threads);

 private:
  void make_room(std::int64_t rows);

  bool rounds_;
  std::vector<std::int64_t> strides_;
  std::vector<DecodeOperation> operations_;
  std::deque<std::vector<std::int64_t>> columns_;
  std::vector<float> memory_;
  std::vector<float*> buffers_;
  std::vector<void*> packs_;
};

}  // namespace fastppo
