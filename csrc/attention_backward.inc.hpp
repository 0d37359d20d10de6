// The gradients of attention over ragged sequences for one instruction set; included by the file that is compiled for
// it. The probabilities are made again from the queries, the keys and the log of each softmax's sum.
#pragma once

#include "attention_training.inc.hpp"

namespace fastppo {
namespace {

// What the backward pass of one sequence under one head of keys works on; rows have zeros up to a multiple of 16.
struct Backward {
  float* keys;  // (blocks·16, head_size), and transposed as the cache has them
  float* cached_keys;
  float* cached_values;  // transposed too
  float* d_keys;         // (blocks·16, head_size)
  float* d_values;       // (blocks·16, value_size), before that the values
  float* queries;        // (16, head_size), as all below for one head and 16 rows
  float* d_queries;
  float* d_out;    // (16, value_size)
  float* weights;  // (16, chunk_keys)
  float* d_scores;
  float log_sums[most_tile_rows];
  float deltas[most_tile_rows];  // Σ d_out·out
  std::int64_t first[most_tile_rows];
  std::int64_t last[most_tile_rows];
};

inline std::int64_t backward_numbers(std::int64_t most, std::int64_t head_size, std::int64_t value_size) {
  return most * (3 * round_up(head_size) + 2 * round_up(value_size)) +
         most_tile_rows * (2 * round_up(head_size) + round_up(value_size) + 2 * chunk_keys);
}

inline Backward make_backward(float* at, std::int64_t most, std::int64_t head_size, std::int64_t value_size) {
  const std::int64_t key_width = round_up(head_size), width = round_up(value_size);
  Backward work = {};
  work.keys = at;
  work.cached_keys = work.keys + most * key_width;
  work.d_keys = work.cached_keys + most * key_width;
  work.cached_values = work.d_keys + most * key_width;
  work.d_values = work.cached_values + most * width;
  work.queries = work.d_values + most * width;
  work.d_queries = work.queries + most_tile_rows * key_width;
  work.d_out = work.d_queries + most_tile_rows * key_width;
  work.weights = work.d_out + most_tile_rows * width;
  work.d_scores = work.weights + most_tile_rows * chunk_keys;
  return work;
}

// Replace scores by probabilities, and their gradients before the softmax by those of the scores.
inline void differentiate(float* scores, float* d_scores, std::int64_t begin, std::int64_t end, const Shaping& how,
                          float log_sum, float delta) {
  const Vec shift = Vec::of(log_sum), mean = Vec::of(delta);
  for (std::int64_t i = begin; i < end; i += Vec::width) {
    Vec slopes;
    const Vec p = exp(shape_scores(Vec::load(scores + i), i, how, &slopes) - shift);
    p.store(scores + i);
    (p * (Vec::load(d_scores + i) - mean) * slopes).store(d_scores + i);
  }
}

// Add to d_queries of `rows` rows what the keys lo·16..hi·16 of a chunk give.
inline void add_to_queries(const Backward& work, std::int64_t rows, std::int64_t head_size, std::int64_t chunk,
                           std::int64_t lo, std::int64_t hi) {
  const std::int64_t width = round_up(head_size), start = chunk * chunk_keys;
  const float* keys[chunk_blocks];
  for (std::int64_t b = lo; b < hi; ++b) keys[b] = work.keys + (start + b * cache_block) * width;
  for (std::int64_t r = 0; r < rows;) {
    const std::int64_t count = rows - r >= 4 ? 4 : 1;
    const Terms<float> terms = {work.d_scores + r * chunk_keys,
                                chunk_keys,
                                1,
                                keys,
                                width,
                                larger(work.first[r] - start, lo * cache_block),
                                smaller(work.last[r + count - 1] - start + 1, hi * cache_block)};
    float* sums = work.d_queries + r * width;
    count == 4 ? add_terms<4>(terms, width, sums, width) : add_terms<1>(terms, width, sums, width);
    r += count;
  }
}

// Add to d_keys and d_values of these keys what `rows` rows give, four keys at a time.
inline void add_to_keys(const Backward& work, std::int64_t rows, std::int64_t head_size, std::int64_t value_size,
                        std::int64_t chunk, std::int64_t lo, std::int64_t hi) {
  const std::int64_t key_width = round_up(head_size), width = round_up(value_size);
  for (std::int64_t j = lo * cache_block; j < hi * cache_block; j += 4) {
    const std::int64_t key = chunk * chunk_keys + j;
    std::int64_t begin = 0, end = rows;
    while (begin < end && work.last[begin] < key) ++begin;
    while (begin < end && work.first[end - 1] > key + 3) --end;
    if (begin == end) continue;
    add_terms<4>(Terms<float>{work.d_scores + j, 1, chunk_keys, &work.queries, key_width, begin, end}, key_width,
                 work.d_keys + key * key_width, key_width);
    add_terms<4>(Terms<float>{work.weights + j, 1, chunk_keys, &work.d_out, width, begin, end}, width,
                 work.d_values + key * width, width);
  }
}

// The rows of one step under one head, whose queries, d_out, log_sums, deltas, first and last are in place.
inline void backward_tile(const Backward& work, const RaggedRows& rows, const AttentionShape& shape, std::int64_t head,
                          std::int64_t count) {
  const std::int64_t key_size = rows.head_size * cache_block, value_size = rows.value_size * cache_block;
  for (std::int64_t i = 0; i < count * round_up(rows.head_size); ++i) work.d_queries[i] = 0;
  const std::int64_t first = work.first[0], last = work.last[count - 1];
  for (std::int64_t chunk = first / chunk_keys; chunk * chunk_keys <= last; ++chunk) {
    const std::int64_t start = chunk * chunk_blocks;
    const std::int64_t lo = larger(first / cache_block - start, 0);
    const std::int64_t hi = smaller(last / cache_block - start + 1, chunk_blocks);
    const float* keys[chunk_blocks];
    const float* values[chunk_blocks];
    for (std::int64_t b = lo; b < hi; ++b) {
      keys[b] = work.cached_keys + (start + b) * key_size;
      values[b] = work.cached_values + (start + b) * value_size;
    }
    score(work.queries, count, round_up(rows.head_size), keys + lo, hi - lo, rows.head_size,
          work.weights + lo * cache_block);
    score(work.d_out, count, round_up(rows.value_size), values + lo, hi - lo, rows.value_size,
          work.d_scores + lo * cache_block);
    for (std::int64_t r = 0; r < count; ++r) {
      const Shaping how =
          shaping_of(shape, head, work.first[r] - chunk * chunk_keys, work.last[r] - chunk * chunk_keys);
      differentiate(work.weights + r * chunk_keys, work.d_scores + r * chunk_keys, lo * cache_block, hi * cache_block,
                    how, work.log_sums[r], work.deltas[r]);
    }
    add_to_queries(work, count, rows.head_size, chunk, lo, hi);
    add_to_keys(work, count, rows.head_size, rows.value_size, chunk, lo, hi);
  }
}
inline float dot(const float* a, const float* b, std::int64_t size) {
  Vec total = Vec::of(0);
  for (std::int64_t d = 0; d < size; d += Vec::width) total = fma(Vec::load(a + d), Vec::load(b + d), total);
  return sum(total);
}

inline void backward_sequence(Backward* work, const RaggedRows& rows, const AttentionShape& shape,
                              const BackwardHeads& heads, const float* log_sums, const Sequence& sequence) {
  const std::int64_t key_width = round_up(rows.head_size), width = round_up(rows.value_size);
  const std::int64_t group = rows.heads / rows.kv_heads;
  const float factor = query_factor(shape);
  copy_rows(sequence, heads.keys, rows.head_size, work->keys);
  copy_rows(sequence, heads.values, rows.value_size, work->d_values);
  transpose(sequence, work->keys, rows.head_size, work->cached_keys);
  transpose(sequence, work->d_values, rows.value_size, work->cached_values);
  for (std::int64_t i = 0; i < sequence.blocks * cache_block * key_width; ++i) work->d_keys[i] = 0;
  for (std::int64_t i = 0; i < sequence.blocks * cache_block * width; ++i) work->d_values[i] = 0;
  for (std::int64_t head = sequence.head * group; head < (sequence.head + 1) * group; ++head) {
    for (std::int64_t start = 0; start < sequence.queries; start += most_tile_rows) {
      const std::int64_t count = smaller(most_tile_rows, sequence.queries - start);
      for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t token = sequence.start + start + r;
        float* d_out = work->d_out + r * width;
        sequence.find_seen(rows, shape, start + r, work->first + r, work->last + r);
        load_head(heads.queries, token, head, rows.head_size, factor, work->queries + r * key_width);
        load_head(heads.out, token, head, rows.value_size, 1.0f, work->weights);
        load_head(heads.d_out, token, head, rows.value_size, 1.0f, d_out);
        work->deltas[r] = dot(work->weights, d_out, width);
        work->log_sums[r] = log_sums[token * rows.heads + head];
      }
      backward_tile(*work, rows, shape, head, count);
      for (std::int64_t r = 0; r < count; ++r) {
        store_head(work->d_queries + r * key_width, factor, rows.head_size, heads.d_queries,
                   sequence.start + start + r, head);
      }
    }
  }
  for (std::int64_t j = 0; j < sequence.keys; ++j) {
    const std::int64_t token = sequence.key_start + j;
    store_head(work->d_keys + j * key_width, 1.0f, rows.head_size, heads.d_keys, token, sequence.head);
    store_head(work->d_values + j * width, 1.0f, rows.value_size, heads.d_values, token, sequence.head);
  }
}

void backward(const RaggedRows& rows, const AttentionShape& shape, const BackwardHeads& heads, const float* log_sums) {
  const std::int64_t most = most_keys(rows), numbers = backward_numbers(most, rows.head_size, rows.value_size);
#pragma omp parallel num_threads(rows.threads)
  {
    auto* scratch = static_cast<float*>(thread_scratch(sizeof(float) * static_cast<std::size_t>(numbers)));
    Backward work = make_backward(scratch, most, rows.head_size, rows.value_size);
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t item = 0; item < rows.sequences * rows.kv_heads; ++item) {
      backward_sequence(&work, rows, shape, heads, log_sums,
                        Sequence(rows, item / rows.kv_heads, item % rows.kv_heads));
    }
  }
}

constexpr AttentionKernels attention_kernels = {write_part, attend_part, scratch_bytes, forward, backward};

}  // namespace
}  // namespace fastppo
