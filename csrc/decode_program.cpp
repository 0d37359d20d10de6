#include "decode_program.hpp"

#include <algorithm>
#include <cstddef>

#include "cpu.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastppo {

namespace {

// Whole vectors of every instruction set, and whole lines of the cache, so that threads do not share one.
constexpr std::int64_t line = 16;

std::int64_t whole_lines(std::int64_t floats) { return (floats + line - 1) / line * line; }

void run_part(const std::vector<DecodeOperation>& operations, const DecodeStep& step, int thread, int num_threads) {
  const auto part = kernels().decode.part;
  for (const DecodeOperation& operation : operations) {
    if (operation.waits) {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }
    part(operation, step, thread, num_threads);
  }
}

}  // namespace

DecodeProgram::DecodeProgram(const std::vector<std::int64_t>& widths, bool rounds) : rounds_(rounds) {
  for (const std::int64_t width : widths) strides_.push_back(whole_lines(width));
  if (!strides_.empty()) strides_[0] = widths[0];
}

const std::int64_t* DecodeProgram::keep(const std::vector<std::int64_t>& columns) {
  columns_.push_back(columns);
  return columns_.back().data();
}

void DecodeProgram::make_room(std::int64_t rows) {
  std::vector<std::int64_t> sizes;
  for (std::size_t i = 1; i < strides_.size(); ++i) sizes.push_back(rows * strides_[i]);
  const auto packed_bytes = kernels().small_matmul.packed_bytes;
  std::vector<std::int64_t> packs;
  for (const DecodeOperation& operation : operations_) {
    if (operation.kind != Operation::pack) continue;
    const auto number = static_cast<std::size_t>(operation.multiply.shared_pack);
    packs.resize(std::max(packs.size(), number + 1));
    const SmallMatmul& matmul = operation.multiply.matmul;
    packs[number] = std::max(packs[number], packed_bytes(rows, matmul.inputs, matmul.type));
  }
  constexpr auto float_bytes = static_cast<std::int64_t>(sizeof(float));
  for (const std::int64_t bytes : packs) sizes.push_back(whole_lines((bytes + float_bytes - 1) / float_bytes));
  std::int64_t total = line;
  for (const std::int64_t size : sizes) total += size;
  if (memory_.size() < static_cast<std::size_t>(total)) memory_.assign(static_cast<std::size_t>(total), 0.0f);
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
  float* at = memory_.data() + (64 - address % 64) % 64 / sizeof(float);
  buffers_.assign(1, nullptr);
  packs_.clear();
  for (std::size_t i = 0; i < sizes.size(); at += sizes[i++]) {
    i + 1 < strides_.size() ? buffers_.push_back(at) : packs_.push_back(at);
  }
}

void DecodeProgram::run(DecodeStep step, float* out, int threads) {
  if (step.rows == 0) return;
  make_room(step.rows);
  buffers_[0] = out;
  step.buffers = buffers_.data();
  step.strides = strides_.data();
  step.packs = packs_.data();
  step.rounds = rounds_;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  run_part(operations_, step, omp_get_thread_num(), omp_get_num_threads());
#else
  static_cast<void>(threads);
  run_part(operations_, step, 0, 1);
#endif
}

}  // namespace fastppo
