#include "decode_loop.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu.hpp"

namespace fastppo {

namespace {

bool has_ended(const DecodeLoop& loop, const std::int64_t* tokens) {
  const auto is_end = [&](std::int64_t token) { return std::count(loop.ends, loop.ends + loop.num_ends, token) > 0; };
  return std::any_of(tokens, tokens + loop.sampling.rows, is_end);
}

}  // namespace

std::int64_t run_loop(DecodeProgram& program, DecodeStep step, const DecodeLoop& loop, int threads) {
  const std::int64_t rows = step.rows;
  std::vector<std::int32_t> positions(step.positions, step.positions + rows);
  std::vector<std::int64_t> places(loop.sampling.positions, loop.sampling.positions + rows);
  const auto is_forbidden = std::make_unique<bool[]>(static_cast<std::size_t>(rows));
  SamplingRows sampling = loop.sampling;
  SmallMatmul head = loop.head;
  step.positions = positions.data();
  sampling.positions = places.data();
  sampling.is_forbidden = is_forbidden.get();
  for (std::int64_t done = 0; done < loop.most; ++done) {
    float* hidden = loop.hidden + done * rows * head.inputs;
    program.run(step, hidden, threads);
    head.x = hidden;
    head.x_stride = head.inputs;
    small_matmul(head, false, loop.head_threads);
    for (std::int64_t r = 0; r < rows; ++r) is_forbidden[static_cast<std::size_t>(r)] = loop.drawn[r] + done < loop.least;
    const std::int64_t first = done * rows;
    const Draws out = {loop.out.tokens + first, loop.out.logprobs + first, loop.out.entropies + first,
                       loop.out.kept_mass + first};
    kernels().sampling.sample(sampling, out);
    if (has_ended(loop, out.tokens)) return done + 1;
    step.ids = out.tokens;
    for (std::int32_t& position : positions) ++position;
    for (std::int64_t& place : places) ++place;
  }
  return loop.most;
}

}  // namespace fastppo
