// The draw of a token for one instruction set; included by the file that is compiled for it.
#pragma once

#include "elementary.hpp"
#include "philox.hpp"
#include "weights.inc.hpp"

namespace fastppo {
namespace {

struct Place {
  std::int64_t block;
  double rest;  // of the goal, within the block
};

// Find the block in which the running sum passes the goal; the last that is not empty if rounding lets none.
template <typename F>
inline Place find_block(std::int64_t blocks, double goal, F block_sum) {
  Place last = {0, goal};
  double running = 0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const double before = running, here = block_sum(b);
    if (here > 0) last = {b, goal - before};
    running += here;
    if (running > goal) break;
  }
  return last;
}

// Find the token of a block at which the running sum of the weights >= least passes the goal; the last possible one if
// rounding lets none.
inline std::int64_t find_token(const float* weights, float least, double goal) {
  std::int64_t last = 0;
  double running = 0;
  for (std::int64_t i = 0; i < draw_block; ++i) {
    if (!(weights[i] > 0 && weights[i] >= least)) continue;
    last = i;
    running += weights[i];
    if (running > goal) break;
  }
  return last;
}

// The tokens that top-p leaves: of the blocks up to `last`, those of weight >= limit, after it those above the limit.
struct Nucleus {
  float limit;
  std::int64_t last;
  double total;

  float limit_of(std::int64_t block) const { return block <= last ? limit : next_above(limit); }
};

// Keep the first `wanted` of the tokens that weigh exactly `limit`: return the block of the last of them, and take the
// weight from those after it in this block.
inline std::int64_t cut_equals(const Workspace& work, float limit, std::int64_t wanted) {
  for (std::int64_t b = 0; b < work.blocks; ++b) {
    if (work.sums[b] < limit) continue;
    float* weights = work.weights + b * draw_block;
    std::int64_t equal = 0;
    for (std::int64_t i = 0; i < draw_block; ++i) equal += weights[i] == limit;
    if (equal >= wanted) {
      for (std::int64_t i = 0; i < draw_block; ++i) {
        if (weights[i] == limit && --wanted < 0) weights[i] = 0;
      }
      return b;
    }
    wanted -= equal;
  }
  return work.blocks;
}

// `is_sparse` says that most tokens are out of the question already.
inline Nucleus find_nucleus(const Workspace& work, double total, double top_p, bool is_sparse) {
  const std::int64_t count = work.blocks * draw_block;
  // All that weighs less than this adds up to less than 1 - top_p, with a margin for rounding; weight 0 is never drawn.
  const auto fair = static_cast<float>(0.999 * (1 - top_p) * total / static_cast<double>(count));
  const float least = fair > 1e-37f ? fair : 1e-37f;
  const double target = top_p * total;
  const Bracket in = is_sparse ? Bracket{least, infinity()}
                               : guess<true>(work.weights, count, total - target, least, work.buffer);
  const Threshold found = row_threshold<true>(work.weights, count, work.sums, target, least, in, work.buffer);
  if (!found.is_found) return {least, work.blocks, total};
  auto equal = static_cast<std::int64_t>(__builtin_ceil((target - found.above) / found.value));
  equal = equal < 1 ? 1 : equal;
  const double kept = found.above + static_cast<double>(equal) * found.value;
  if (equal >= found.equal) return {found.value, work.blocks, kept};
  return {found.value, cut_equals(work, found.value, equal), kept};
}

// The k-th largest logit of a row, k < count. The k-th largest of the blocks' largest is a lower bound near by.
template <typename T>
inline float find_kth(const Row<T>& row, std::int64_t k, const Workspace& work) {
  const auto wanted = static_cast<double>(k);
  Bracket in = {-infinity(), infinity()};
  if (k <= work.blocks) {
    __builtin_memcpy(work.buffer, work.largest, sizeof(float) * static_cast<std::size_t>(work.blocks));
    in.low = select<false>(work.buffer, work.blocks, 0.0, wanted).value;
  } else {
    in = guess<false>(row.at, row.count, static_cast<double>(row.count - k), in.low, work.buffer);
  }
  return row_threshold<false>(row.at, row.count, work.largest, wanted, -infinity(), in, work.buffer).value;
}

template <typename T>
inline std::int64_t find_first(const Row<T>& row, float value, const Workspace& work) {
  std::int64_t i = 0;
  while (work.largest[i / draw_block] != value) i += draw_block;
  while (to_float(row.at[i]) != value) ++i;
  return i;
}

struct Choice {
  std::int64_t token;
  double weight;  // of all that could be drawn, relative to the largest logit among it
};

// Whether top-k or top-p leave tokens out, for which the weights must be kept.
inline bool is_truncated(const SamplingRows& rows) {
  return !rows.is_greedy && ((rows.top_k > 0 && rows.top_k < rows.vocabulary) || rows.top_p < 1);
}

inline double number_of(const SamplingRows& rows, std::int64_t r) {
  return uniform(rows.seed, rows.requests[r], rows.positions[r]);
}

// Draw where nothing is truncated; of the blocks that are in `copied`, the logits lie in the workspace.
template <typename T, typename F>
inline Choice choose_by_sums(const SamplingRows& rows, const Row<T>& row, double u, Totals totals,
                             const Workspace& work, F copied) {
  const Place place = find_block(work.blocks, u * totals.weights, [&](std::int64_t b) { return work.sums[b]; });
  const std::int64_t start = place.block * draw_block, rest = row.count - start;
  float* weights = work.weights + (is_truncated(rows) ? start : 0);
  const auto weigh_again = [&](std::int64_t, const auto* block) {
    Vec w_sum = Vec::of(0), x_sum = w_sum;
    weigh_block<true>(block, Vec::of(totals.top), Vec::of(row.exponent()), weights, &w_sum, &x_sum);
  };
  if (copied(place.block)) {
    weigh_again(0, work.logits + start);
  } else if (!is_truncated(rows)) {
    for_blocks(row.at + start, rest < draw_block ? rest : draw_block, weigh_again);
  }
  return {start + find_token(weights, 0, place.rest), totals.weights};
}

// Draw from a row that has been weighed.
template <typename T>
inline Choice choose(const SamplingRows& rows, std::int64_t r, const Row<T>& row, Totals totals, const Workspace& work) {
  if (rows.is_greedy) return {find_first(row, totals.top, work), 0};
  const double u = number_of(rows, r);
  const bool has_top_k = rows.top_k > 0 && rows.top_k < row.count;
  if (has_top_k) totals.weights = limit(row, find_kth(row, rows.top_k, work), work);
  if (rows.top_p < 1) {
    const Nucleus nucleus = find_nucleus(work, totals.weights, rows.top_p, has_top_k);
    const Place place = find_block(work.blocks, u * nucleus.total, [&](std::int64_t b) {
      const float least = nucleus.limit_of(b);
      return work.sums[b] < least ? 0.0 : total_from<true>(work.weights + b * draw_block, draw_block, least);
    });
    const std::int64_t start = place.block * draw_block;
    return {start + find_token(work.weights + start, nucleus.limit_of(place.block), place.rest), nucleus.total};
  }
  return choose_by_sums(rows, row, u, totals, work, [](std::int64_t) { return false; });
}

// Whether an id is one of the vocabulary and lies in a block.
inline bool is_in(const SamplingRows& rows, std::int64_t id, std::int64_t block) {
  return id >= 0 && id < rows.vocabulary && id / draw_block == block;
}

inline bool has_forbidden(const SamplingRows& rows, std::int64_t block) {
  for (std::int64_t i = 0; i < rows.num_forbidden; ++i) {
    if (is_in(rows, rows.forbidden_ids[i], block)) return true;
  }
  return false;
}

// Copy the blocks with forbidden ids without these and sum them anew; return the weight of all that is left, or -1 if one
// of the ids has the largest logit, from which all are counted, or if there are many.
template <typename T>
inline double leave_out(const SamplingRows& rows, const Row<T>& row, float top, const Workspace& work) {
  constexpr std::int64_t most = 16;
  if (rows.num_forbidden > most) return -1;
  const std::int64_t *begin = rows.forbidden_ids, *end = begin + rows.num_forbidden;
  for (const std::int64_t* id = begin; id < end; ++id) {
    if (*id >= 0 && *id < row.count && to_float(row.at[*id]) >= top) return -1;
  }
  for (const std::int64_t* id = begin; id < end; ++id) {
    if (*id < 0 || *id >= row.count) continue;
    const std::int64_t block = *id / draw_block, start = block * draw_block, rest = row.count - start;
    float* left = work.logits + start;
    for (std::int64_t i = 0; i < draw_block; ++i) left[i] = i < rest ? to_float(row.at[start + i]) : -infinity();
    for (const std::int64_t* other = begin; other < end; ++other) {
      if (is_in(rows, *other, block)) left[*other - start] = -infinity();
    }
    Vec w_sum = Vec::of(0), x_sum = w_sum;
    weigh_block<false>(left, Vec::of(top), Vec::of(row.exponent()), work.weights, &w_sum, &x_sum);
    work.sums[block] = sum(w_sum);
  }
  double total = 0;
  for (std::int64_t b = 0; b < work.blocks; ++b) total += work.sums[b];
  return total;
}

// Copy a row without the forbidden ids, whose logits become -inf.
template <typename T>
inline Row<float> without_forbidden(const SamplingRows& rows, const Row<T>& row, const Workspace& work) {
  for (std::int64_t i = 0; i < row.count; ++i) work.logits[i] = to_float(row.at[i]);
  for (std::int64_t i = 0; i < rows.num_forbidden; ++i) {
    const std::int64_t id = rows.forbidden_ids[i];
    if (id >= 0 && id < row.count) work.logits[id] = -infinity();
  }
  return {work.logits, row.count, row.factor};
}

template <typename T>
inline Totals weigh_for(const SamplingRows& rows, const Row<T>& row, float top, const Workspace& work) {
  return is_truncated(rows) ? weigh<true>(row, top, work) : weigh<false>(row, top, work);
}

// Whether a row has ids that it may not draw.
inline bool is_restricted(const SamplingRows& rows, std::int64_t r) {
  return rows.num_forbidden > 0 && (rows.is_forbidden == nullptr || rows.is_forbidden[r]);
}

template <typename T>
inline void draw(const SamplingRows& rows, std::int64_t r, const Row<T>& row, const Workspace& work, const Draws& out) {
  const float top = find_largest(row, work.largest);
  const Totals all = weigh_for(rows, row, top, work);
  Choice choice = {0, 0};
  bool can_draw = all.weights < infinity();
  const bool is_limited = is_restricted(rows, r), is_plain = !rows.is_greedy && !is_truncated(rows);
  const double left = can_draw && is_limited && is_plain ? leave_out(rows, row, top, work) : -1;
  if (left > 0) {
    const double u = number_of(rows, r);
    const auto is_copied = [&](std::int64_t block) { return has_forbidden(rows, block); };
    choice = choose_by_sums(rows, row, u, {top, left, 0}, work, is_copied);
  } else if (can_draw && is_limited) {
    const Row<float> rest = without_forbidden(rows, row, work);
    const float rest_top = find_largest(rest, work.largest);
    can_draw = rest_top > -infinity();
    if (can_draw) choice = choose(rows, r, rest, weigh_for(rows, rest, rest_top, work), work);
    choice.weight *= __builtin_exp((static_cast<double>(rest_top) - top) * row.factor);
  } else if (can_draw) {
    choice = choose(rows, r, row, all, work);
  }
  const double log_total = can_draw ? __builtin_log(all.weights) : __builtin_nan("");
  const double x = (static_cast<double>(to_float(row.at[choice.token])) - top) * row.factor;
  out.tokens[r] = choice.token;
  out.logprobs[r] = static_cast<float>(x - log_total);
  out.entropies[r] = static_cast<float>(log_total - 0.693147180559945309417 * all.powers / all.weights);
  out.kept_mass[r] = rows.is_greedy ? 1.0f : static_cast<float>(choice.weight / all.weights);
}

template <typename T>
void draw_row(const SamplingRows& rows, std::int64_t r, const Workspace& work, const Draws& out) {
  const T* logits = static_cast<const T*>(rows.logits.data) + r * rows.logits.stride;
  const Scaling& scaling = rows.scaling;
  if (!(scaling.softcap > 0)) {
    const double factor = static_cast<double>(scaling.logit_scale) * scaling.inverse_temperature;
    draw(rows, r, Row<T>{logits, rows.vocabulary, factor}, work, out);
    return;
  }
  const Vec inner = Vec::of(scaling.logit_scale / scaling.softcap);
  for_blocks(logits, rows.vocabulary, [&](std::int64_t b, const auto* block) {
    for (std::int64_t i = 0; i < draw_block; i += Vec::width) {
      Vec slope;
      tanh(Vec::load(block + i) * inner, &slope).store(work.logits + b * draw_block + i);
    }
  });
  const double factor = static_cast<double>(scaling.softcap) * scaling.inverse_temperature;
  draw(rows, r, Row<float>{work.logits, rows.vocabulary, factor}, work, out);
}

void sample(const SamplingRows& rows, const Draws& out) {
#pragma omp parallel num_threads(rows.threads)
  {
    const Workspace work(rows.vocabulary);
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows.rows; ++r) {
      rows.logits.is_bfloat16 ? draw_row<BFloat16>(rows, r, work, out) : draw_row<float>(rows, r, work, out);
    }
  }
}

constexpr SamplingKernels sampling_kernels = {sample};

}  // namespace
}  // namespace fastppo
